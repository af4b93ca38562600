"""LlamaIndex's nodes and our passages, one as the other."""

from __future__ import annotations

from collections import defaultdict
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

from ragkv.adapters.passages import REFERENCE, Passage, metadata_of, reference
from ragkv.errors import DocumentError
from ragkv.retrieval import Document, Hit

#: Where a document's metadata keep the nodes that it was made of, one a passage.
NODES = "llamaindex_nodes"
#: What documents made of nodes are called in their folder, in front of their ids.
ADDED = "llamaindex:"


def node_of(hit: Hit) -> BaseNode:
    """A passage as a node that refers to it: the one that it was added as, or a ``TextNode``.

    What the model is shown of it (``MetadataMode.LLM``) is the passage's text.
    """
    if NODES in hit.metadata:
        node = metadata_dict_to_node(hit.metadata[NODES][hit.position])
    else:
        start, end = hit.span or (None, None)
        node = TextNode(
            id_=f"{hit.document_id}:{hit.position}",
            text=hit.text,
            metadata=metadata_of(hit),
            start_char_idx=start,
            end_char_idx=end,
            relationships={NodeRelationship.SOURCE: RelatedNodeInfo(node_id=hit.source, node_type=ObjectType.DOCUMENT)},
        )
        node.excluded_llm_metadata_keys = list(node.metadata)
        node.excluded_embed_metadata_keys = list(node.metadata)
    return _referring(node, reference(hit))


def shown(node: BaseNode) -> str:
    """What a model is shown of a node."""
    return node.get_content(metadata_mode=MetadataMode.LLM)


def passage_of(node: NodeWithScore) -> Passage:
    """What a model is shown of a node that was found, with its reference if it has one."""
    return Passage(shown(node.node), f"node {node.node.node_id}", node.node.metadata.get(REFERENCE))


def kept(node: BaseNode) -> dict[str, Any]:
    """A node as its document's metadata keep it, without its reference: where it stands may change.

    Raises:
        DocumentError: it has no text, or metadata that JSON cannot hold.
    """
    if not shown(node).strip():
        raise DocumentError(f"node {node.node_id} has no text: leave it out. Nothing was added")
    plain = node.model_copy()
    plain.metadata = {name: value for name, value in node.metadata.items() if name != REFERENCE}
    try:
        return node_to_metadata_dict(plain)
    except (TypeError, ValueError) as error:
        raise DocumentError(
            f"node {node.node_id} has metadata that JSON cannot hold: {error}. Nothing was added"
        ) from error


def nodes_of(document: Document) -> dict[str, BaseNode]:
    """The nodes that a document was made of, in order, by id; none where it was made of something else."""
    nodes = [metadata_dict_to_node(fields) for fields in document.metadata.get(NODES, ())]
    places = [{"document": document.id, "passage": number} for number in range(len(nodes))]
    return {node.node_id: _referring(node, place) for node, place in zip(nodes, places, strict=True)}


def ordered(nodes: dict[str, BaseNode]) -> dict[str, BaseNode]:
    """Nodes of one document by id, each behind the one that is before it (``PREVIOUS``, ``NEXT``) where both are there."""
    before = {node.next_node.node_id: name for name, node in nodes.items() if node.next_node}
    before |= {name: node.prev_node.node_id for name, node in nodes.items() if node.prev_node}
    behind: defaultdict[str, list[str]] = defaultdict(list)
    for name in nodes:
        behind[before.get(name, "")].append(name)
    first = [name for name in nodes if before.get(name) not in nodes]
    placed: dict[str, BaseNode] = {}
    for start in [*first, *nodes]:  # the latter for those that stand behind each other in a circle
        waiting = [start]
        while waiting:
            name = waiting.pop()
            if name not in placed:
                placed[name] = nodes[name]
                waiting += reversed(behind[name])
    return placed


def _referring(node: BaseNode, place: dict[str, Any]) -> BaseNode:
    """The node, with a reference that no model is shown."""
    node.metadata = {**node.metadata, REFERENCE: place}
    for hidden in (node.excluded_llm_metadata_keys, node.excluded_embed_metadata_keys):
        if REFERENCE not in hidden:
            hidden.append(REFERENCE)
    return node
