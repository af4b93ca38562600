"""Loading a model with its tokenizer, and an embedder, by name."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from ragkv.errors import (
    ArgumentError,
    MissingPackageError,
    ModelNotFoundError,
    UnknownArgumentError,
    UnsupportedModelError,
    first_line,
    instance,
)
from ragkv.prompt import PromptTemplate
from ragkv.retrieval import Embedder, SentenceTransformerEmbedder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: The name under which the model that ragkv ships is asked for.
BUNDLED = "bundled"

#: Options that say where a model stands: they hold for weights, configuration and tokenizer.
PLACE = ("revision", "subfolder", "gguf_file")

#: How files are fetched: they hold for a tokenizer of another name too.
_FETCHING = (
    *("trust_remote_code", "token", "cache_dir", "local_files_only"),
    *("force_download", "proxies", "code_revision"),
)

_OF_WEIGHTS = (
    *("dtype", "attn_implementation", "experts_implementation", "device_map", "max_memory", "offload_folder"),
    *("offload_buffers", "quantization_config", "config", "variant", "use_safetensors", "weights_only", "use_kernels"),
    *("kernel_config", "key_mapping", "adapter_kwargs", "adapter_name", "generation_config", "ignore_mismatched_sizes"),
    *("disable_mmap", "tp_plan", "tp_size", "device_mesh", "distributed_config"),
)

#: What :func:`load_model` takes: options of ``from_pretrained``, and how weights are packed.
OPTIONS = frozenset((*PLACE, *_FETCHING, *_OF_WEIGHTS, "weights"))

_NOT_BUNDLED = frozenset((*PLACE, *_FETCHING, "tokenizer", "system", "config", "variant", "adapter_kwargs")) - {
    "local_files_only"  # which it does anyway, and which holds for an embedder too
}


def load_embedder(
    embedder: str | os.PathLike[str] | Embedder | None, local_files_only: bool = False
) -> Embedder | None:
    """A sentence-transformers model by name or path; an embedder, or none, is passed through.

    Raises:
        ArgumentTypeError: it is neither.
    """
    instance(
        "embedder",
        embedder,
        str | os.PathLike | Embedder | None,
        "a model's name or path, or a ragkv.retrieval.Embedder",
    )
    if isinstance(embedder, str | os.PathLike):
        return SentenceTransformerEmbedder(os.fspath(embedder), local_files_only=local_files_only)
    return embedder


def gguf_apart(model: Any, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The path of a GGUF file as its folder, and an option that names the file there; anything else as it is."""
    if isinstance(model, str | os.PathLike) and os.fspath(model).endswith(".gguf") and os.path.isfile(model):
        folder, file = os.path.split(os.path.abspath(model))
        return folder, {**options, "gguf_file": file}
    return model, options


class Loaded(NamedTuple):
    """A model in eval mode on its device, its tokenizer, and what it brings along, if anything: template, foreign text, method."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    template: PromptTemplate | None = None
    foreign: str | None = None
    method: str | None = None


def check_options(model: str | os.PathLike[str], options: Iterable[str], others: Iterable[str] = ()) -> None:
    """Refuse options before anything is loaded.

    Args:
        model: as for :func:`load_model`.
        options: names of those that were given.
        others: names of those that the caller takes itself.

    Raises:
        TypeError: there is no such option; the message lists all that there are.
        ArgumentError: it means nothing for the bundled model.
    """
    unknown = sorted({*options} - OPTIONS - {*others})
    if unknown:
        raise UnknownArgumentError(
            f"there is no option {', '.join(unknown)}; there are: {', '.join(sorted({*OPTIONS, *others}))}"
        )
    useless = sorted({*options} & _NOT_BUNDLED) if model == BUNDLED else []
    if useless:
        raise ArgumentError(
            f"{', '.join(useless)} cannot be given with the bundled model, which has its own tokenizer and template and is "
            "never fetched: leave it out, or name another model"
        )


def load_model(
    model: str | os.PathLike[str],
    device: str | None,
    options: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike[str] | None = None,
    system: str | None = None,
) -> Loaded:
    """Load a model by name or path, its tokenizer first.

    Args:
        model: as transformers takes it, the path of a GGUF file, or :data:`BUNDLED`.
        device: a GPU if there is one, unless given; the CPU for packed weights.
        options: see :data:`OPTIONS`. What says where the model stands holds for its tokenizer too.
        tokenizer: in place of the model's own; or the name or path of one.
        system: text of a system message, for the tokenizer's chat template.

    Raises:
        TypeError, ArgumentError: as :func:`check_options`.
        ModelNotFoundError: model or tokenizer are not where they were asked for.
        MissingPackageError: a GGUF file needs ``ragkv[gguf]``.
        UnsupportedModelError: a GGUF file cannot be read; weights cannot be packed.
        PromptError: a system message, and the tokenizer has no chat template, or one without a place for it.
    """
    import torch

    model, options = gguf_apart(model, options)
    said = {"tokenizer": tokenizer, "system": system}
    more = [name for name, value in said.items() if value is not None]
    check_options(model, [*options, *more], said)
    packing = options.get("weights")
    if packing is not None:
        from ragkv.model.packed import check_packing, pack

        check_packing(packing, device, options)
        options, device = {name: value for name, value in options.items() if name != "weights"}, "cpu"
    _check_places(device, options.get("dtype"))
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if model == BUNDLED:
        from ragkv import bundled

        loaded, words = bundled.load(**options)
        own = Loaded(loaded, words, PromptTemplate(**bundled.TEMPLATE), bundled.foreign(), bundled.METHOD)
    else:
        words = _tokenizer(model, options, tokenizer)
        template = PromptTemplate.from_chat_template(words, system=system) if system else None
        own = Loaded(_weights(model, options).eval(), words, template)
    if packing is not None:
        return own._replace(model=pack(own.model, packing))
    return own if "device_map" in options else own._replace(model=own.model.to(device))


def _check_places(device: Any, dtype: Any) -> None:
    """Refuse a device and a dtype that PyTorch does not know."""
    import torch

    try:
        torch.device("cpu" if device is None else device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"there is no device {device!r}: {first_line(error):.80}") from error
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype.removeprefix("torch."), None)
        if not isinstance(found, torch.dtype):
            raise ArgumentError(
                f"there is no dtype {dtype!r}: give one of PyTorch's, as 'float32' or 'bfloat16', or 'auto'"
            )


def _weights(model: str | os.PathLike[str], options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GgufConfig

    dense = "gguf_file" in options and options.get("quantization_config") is None
    if dense:
        options = {**options, "quantization_config": GgufConfig(dequantize=True)}
    with _found("model", model, options.get("gguf_file")):
        loaded = AutoModelForCausalLM.from_pretrained(model, **{"dtype": "auto", **options})
    if dense:  # a model as any other: what it says of its file would else be part of the space of KV
        loaded.config.__dict__.pop("quantization_config", None)
        loaded.is_quantized, loaded.hf_quantizer = False, None
    return loaded


def _tokenizer(
    model: str | os.PathLike[str],
    options: dict[str, Any],
    given: PreTrainedTokenizerBase | str | os.PathLike[str] | None,
) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    if given is not None and not isinstance(given, str | os.PathLike):
        return given
    place = (*PLACE, *_FETCHING) if given is None else _FETCHING
    file = options.get("gguf_file") if given is None else None
    with _found("model" if given is None else "tokenizer", model if given is None else given, file):
        return AutoTokenizer.from_pretrained(
            model if given is None else given, **{name: options[name] for name in place if name in options}
        )


@contextmanager
def _found(what: str, name: str | os.PathLike[str], gguf_file: str | None = None) -> Iterator[None]:
    """Say what was looked for, and how another one is given, where it is not there; and why a GGUF file cannot be read.

    transformers takes a path that leads nowhere for a name, and complains of its spelling.
    """
    path = os.fspath(name)
    if (os.path.isabs(path) or path.startswith(".")) and not os.path.exists(path):
        raise ModelNotFoundError(_not_found(what, name, "there is no such folder"))
    try:
        if gguf_file is not None:
            import_module("gguf"), import_module("accelerate")
        yield
    except (OSError, SafetensorError) as error:  # not there, or cut short
        raise ModelNotFoundError(_not_found(what, name, first_line(error))) from error
    except ImportError as error:
        if gguf_file is None:
            raise
        raise MissingPackageError(
            f"{gguf_file} is read with the packages gguf and accelerate: pip install 'ragkv[gguf]' ({error})"
        ) from error
    except (ValueError, KeyError, NotImplementedError, struct.error) as error:
        if gguf_file is None:
            bare = what == "model" and os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json"))
            reason = "there is no config.json in this folder" if bare else first_line(error)
            raise ModelNotFoundError(_not_found(what, name, reason)) from error
        raise UnsupportedModelError(
            f"{gguf_file} in {str(name)!r} cannot be read: {first_line(error)}; give a GGUF file of an architecture that "
            "transformers reads from one, or the model's own folder"
        ) from error


def _not_found(what: str, name: object, reason: str) -> str:
    return f"the {what} {str(name)!r} cannot be loaded: {reason}; give another name or path with {what}= (--{what})"
