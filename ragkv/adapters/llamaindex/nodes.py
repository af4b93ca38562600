"""LlamaIndex's nodes and our passages, one as the other."""

from __future__ import annotations

from typing import Any

from llama_index.core.schema import (
    BaseNode,
    MetadataMode,
    NodeRelationship,
    NodeWithScore,
    ObjectType,
    RelatedNodeInfo,
    TextNode,
)
from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict

from ragkv.adapters.passages import REFERENCE, Passage, reference
from ragkv.errors import DocumentError
from ragkv.retrieval import Hit

#: Where a document's metadata keep the nodes that it was made of, one a passage.
NODES = "llamaindex"


def node_of(hit: Hit) -> BaseNode:
    """A passage as a node that refers to it: the one that it was added as, or a ``TextNode``.

    What the model is shown of it (``MetadataMode.LLM``) is the passage's text.
    """
    kept = hit.metadata.get(NODES)
    if kept is not None:
        node = metadata_dict_to_node(kept[hit.position])
    else:
        start, end = hit.span or (None, None)
        node = TextNode(
            id_=f"{hit.document_id}:{hit.position}",
            text=hit.text,
            metadata={"source": hit.source, **hit.metadata},
            start_char_idx=start,
            end_char_idx=end,
            relationships={
                NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.source, node_type=ObjectType.DOCUMENT)
            },
        )
        node.excluded_llm_metadata_keys = node.excluded_embed_metadata_keys = list(node.metadata)
    node.metadata[REFERENCE] = reference(hit)
    node.excluded_llm_metadata_keys = [*node.excluded_llm_metadata_keys, REFERENCE]
    node.excluded_embed_metadata_keys = [*node.excluded_embed_metadata_keys, REFERENCE]
    return node


def scored(hits: list[Hit]) -> list[NodeWithScore]:
    """Passages as nodes with their scores."""
    return [NodeWithScore(node=node_of(hit), score=hit.score) for hit in hits]


def shown(node: BaseNode) -> str:
    """What a model is shown of a node."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def passage_of(node: NodeWithScore) -> Passage:
    """What a model is shown of a node that was found, with its reference if it has one."""
    return Passage(shown(node.node), f"node {node.node.node_id}", node.node.metadata.get(REFERENCE))


def kept(node: BaseNode) -> dict[str, Any]:
    """A node as a document's metadata keep it, for :func:`node_of`.

    Raises:
        DocumentError: it has no text, or metadata that JSON cannot hold.
    """
    if not shown(node).strip():
        raise DocumentError(f"node {node.node_id} has no text: leave it out. Nothing was added")
    try:
        return node_to_metadata_dict(node)
    except (TypeError, ValueError) as error:
        raise DocumentError(
            f"node {node.node_id} has metadata that JSON cannot hold: {error}. Nothing was added"
        ) from error
