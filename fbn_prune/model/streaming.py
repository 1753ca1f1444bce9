"""A model whose weights stay in its checkpoint: one part of it is in memory at a time.

The parts are the decoder layers, the input embedding and the output embedding; norms and other small things stay.
The model itself is the architecture's own, on the meta device, with tables such as the rotary ones in place. When
a part is about to run, its tensors are read from the safetensors, and those of the part before are let go: running
all data through one layer before the next (:mod:`fbn_prune.model.layerwise`) reads each weight once.

A cut layer is not kept either: it is read anew and cut again, by the function that also makes the tensors of the
written checkpoint.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from fbn_prune.errors import InvalidInput
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.families import Family, as_config
from fbn_prune.model.heads import cut_heads
from fbn_prune.model.modeling_ragged import ragged_class
from fbn_prune.model.spill import Spilled
from fbn_prune.model.surgery import (
    MlpCut,
    cut_of_parts,
    cut_parts,
    cut_tensor,
    require_place_for_bias,
    rounded_cut,
    set_features,
)

Part = int | str
"""A decoder layer's number, or the name of an embedding."""

_ATTRIBUTE = "_fbn_prune_stream"
_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES = -3, 2**21


class SpilledCuts(Sequence[MlpCut]):
    """Cuts of the first layers, on disk but for the one asked for last."""

    def __init__(self, folder: Path) -> None:
        self._tensors = Spilled(folder)
        self._places: list[dict[str, int]] = []
        self._last: tuple[int, MlpCut] | None = None

    def append(self, cut: MlpCut) -> None:
        places = {}
        for name, part in cut_parts(cut).items():
            places[name] = len(self._tensors)
            self._tensors.append(part)
        self._places.append(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> MlpCut: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[MlpCut]: ...
    def __getitem__(self, index: int | slice) -> MlpCut | Sequence[MlpCut]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if self._last is None or self._last[0] != index:
            parts = {name: self._tensors[place] for name, place in self._places[index].items()}
            self._last = index, cut_of_parts(parts)
        return self._last[1]


class WeightStream:
    """Brings the parts of a model into memory and lets them go; :func:`stream_of` finds it.

    Attributes
    ----------
    device, dtype
        Where and in what the model computes.
    cuts
        Cuts of the layers cut so far.
    scratch
        Folder for what is not to stay in memory: cuts, and where `spill_hidden` says so, hidden states.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        scratch: Path,
        spill_hidden: bool,
    ) -> None:
        self.family = checkpoint.family
        self.device, self.dtype = device, dtype
        self.scratch, self.spill_hidden = scratch, spill_hidden
        self.cuts = SpilledCuts(scratch)
        self._cuts_heads = False
        self._trial: Sequence[MlpCut] | None = None
        self._here: Part | None = None
        self._model, self._checkpoint = model, checkpoint
        self._modules: dict[Part, nn.Module] = dict(enumerate(self.family.layer_modules(model)))
        self._prefixes: dict[Part, str] = {i: f"{self.family.layers}.{i}." for i in self._modules}
        self._input = self._add(model, model.get_input_embeddings())
        self._output = self._add(model, model.get_output_embeddings())
        self._tied = bool(model.config.tie_word_embeddings)
        check_tensors(checkpoint)
        for part, module in self._modules.items():
            for inner in module.modules():
                if list(inner.parameters(recurse=False)):
                    inner.register_forward_pre_hook(self._hook(part))
        self._load_the_rest(model)

    def bring(self, part: Part) -> None:
        """Have a part in memory, and no other."""
        if self._here == part:
            return
        self.release()
        self._here = part
        prefix = self._prefixes[part]
        for name in [name for name, _ in self._modules[part].named_parameters()]:
            _set(self._modules[part], name, self._value(prefix + name))
        if isinstance(part, int):
            self._set_sizes(part)

    def down_weight(self, layer: int) -> Tensor:
        """A layer's output weights, [hidden, neurons], read by themselves: it is a small part of the layer."""
        name = f"{self._prefixes[layer]}{self.family.output.path}.weight"
        weight = self._value(name)
        return weight if self.family.output.neuron_axis == 1 else weight.T

    def release(self) -> None:
        """Let go of the part in memory, if there is one."""
        if self._here is None:
            return
        module, self._here = self._modules[self._here], None
        for name, parameter in list(module.named_parameters()):
            _set(module, name, torch.empty_like(parameter, device="meta"))
        _give_back_freed_memory()

    def cut(self, cut: MlpCut) -> None:
        """Cut the first layer that is whole: from now on it computes what the written checkpoint's will.

        Raises
        ------
        InvalidInput
            The cut brings a bias to an architecture that has no place for one.
        FbnPruneError
            A new output weight does not fit the type in which the layer is stored.
        """
        self.release()
        require_place_for_bias(self._model, self.family, [cut])
        self._cuts_heads = self._cuts_heads or cut.heads is not None
        self.cuts.append(rounded_cut(cut, self._checkpoint.storage_dtype))

    @contextmanager
    def tried(self, cuts: Sequence[MlpCut]) -> Iterator[None]:
        """Inside the context all layers compute as cut so."""
        self.release()
        require_place_for_bias(self._model, self.family, cuts)
        self._trial = cuts
        try:
            yield
        finally:
            self._trial = None
            self.release()

    def _set_sizes(self, layer: int) -> None:
        """Bring what a layer's modules say of their sizes in line with the weights that are there now."""
        for projection in self.family.projections:
            set_features(self.family.projection_module(self._model, layer, projection))
        attention = self.family.attention
        if attention is None or not self._cuts_heads:
            return
        for head_projection in attention.projections:
            module: Any = self._modules[layer].get_submodule(head_projection.path)
            set_features(module)
        groups = module.weight.shape[1] // self.family.head_shape(self._checkpoint.config).width
        self.family.set_head_groups(self._model, layer, groups)

    def _add(self, model: PreTrainedModel, module: nn.Module) -> str:
        name = next(name for name, other in model.named_modules() if other is module)
        self._modules[name], self._prefixes[name] = module, f"{name}."
        return name

    def _hook(self, part: Part) -> Any:
        def bring(module: nn.Module, args: tuple[Any, ...]) -> None:
            self.bring(part)

        return bring

    def _load_the_rest(self, model: PreTrainedModel) -> None:
        for name in [name for name, _ in model.named_parameters()]:
            if not name.startswith(tuple(self._prefixes.values())):
                _set(model, name, self._value(name))
        for module in model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self.device))

    def _stored_name(self, name: str) -> str:
        """What the checkpoint calls a parameter: base models leave a component out, tied embeddings are stored once."""
        tensors, root = self._checkpoint.tensors, self.family.layers.partition(".")[0]
        candidates = [name, name.removeprefix(f"{root}.")]
        if (other := self.family.stored_as) is not None:
            candidates.append(name.replace(*other))
        if self._tied and name.startswith(self._prefixes[self._output]):
            embedding = self._prefixes[self._input] + "weight"
            candidates += [embedding, embedding.removeprefix(f"{root}.")]
        return next((known for known in candidates if known in tensors), name)

    def _value(self, name: str) -> Tensor:
        """A parameter as stored, or as the cut of its layer makes it."""
        family, location = self.family, self.family.locate(name)
        stored = self._stored_name(name)
        cuts = self.cuts if self._trial is None else self._trial
        at_heads = family.locate_heads(name)
        if at_heads is not None and at_heads.layer < len(cuts):
            heads = cuts[at_heads.layer].heads
            if heads is not None:
                whole = family.head_shape(self._checkpoint.config)
                fewer = cut_heads(at_heads, self._checkpoint.tensor(stored), heads, whole)
                return fewer.to(self.device, self.dtype)
        is_cut = location is not None and location.layer < len(cuts)
        if stored in self._checkpoint.tensors:
            if not is_cut:
                return self._checkpoint.read(stored, self.device, self.dtype)
            tensor = self._checkpoint.tensor(stored)
        else:  # a bias that the cuts bring
            assert location is not None
            config = self._checkpoint.config
            shape = family.tensor_shape(location, family.hidden_size(config), family.width(config))
            tensor = torch.zeros(shape, dtype=self._checkpoint.storage_dtype)
        if is_cut and location is not None:
            tensor = cut_tensor(family, location, tensor, cuts[location.layer])
        return tensor.to(self.device, self.dtype)


def stream_model(
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    *,
    scratch: Path,
    spill_hidden: bool = False,
) -> PreTrainedModel:
    """The model of a checkpoint in evaluation mode, its weights read when they are wanted.

    Parameters
    ----------
    scratch, spill_hidden
        See :class:`WeightStream`.

    Raises
    ------
    InvalidInput
        A tensor that the model needs is not in the checkpoint, or has another shape.
    """
    model = skeleton(checkpoint, dtype)
    model.config.use_cache = False
    model.eval()
    setattr(
        model, _ATTRIBUTE, WeightStream(model, checkpoint, device, dtype, scratch, spill_hidden)
    )
    return model


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint without its weights, which are not touched."""
    model: PreTrainedModel
    with init_empty_weights(include_buffers=False):
        if checkpoint.config.get("per_layer_config"):
            facts = {"ragged_mlp": checkpoint.family.mlp_facts()}
            config = as_config(checkpoint.config | facts)
            stock: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
            model = ragged_class(stock)(config)
        else:
            model = AutoModelForCausalLM.from_config(
                as_config(checkpoint.config), dtype=dtype, trust_remote_code=False
            )
    return model


def check_tensors(checkpoint: Checkpoint) -> None:
    """Hold a checkpoint's headers against the parameters of the architecture; maps no file as a whole.

    Raises
    ------
    InvalidInput
        A parameter is not in the checkpoint, or has another shape there.
    """
    model = skeleton(checkpoint, checkpoint.storage_dtype)
    root = checkpoint.family.layers.partition(".")[0]
    head = model.get_output_embeddings()
    outputs = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    for name, parameter in model.named_parameters():
        candidates = [name, name.removeprefix(f"{root}.")]
        if (other := checkpoint.family.stored_as) is not None:
            candidates.append(name.replace(*other))
        if model.config.tie_word_embeddings and name in outputs:
            continue  # what it is tied to has been seen
        stored = next((known for known in candidates if known in checkpoint.tensors), None)
        if stored is None:
            raise InvalidInput(f"{checkpoint.path}: {name} of the model is not in the checkpoint")
        if checkpoint.shape(stored) != tuple(parameter.shape):
            raise InvalidInput(
                f"{checkpoint.path}: {name} has shape {list(checkpoint.shape(stored))}, "
                f"the model needs {list(parameter.shape)}"
            )


def stream_of(model: PreTrainedModel) -> WeightStream | None:
    """What brings the weights of a streamed model; None for a model that is in memory."""
    return getattr(model, _ATTRIBUTE, None)


def have_layer(model: PreTrainedModel, layer: int) -> None:
    """See to it that a layer's weights can be read."""
    if (stream := stream_of(model)) is not None:
        stream.bring(layer)


def down_weights(model: PreTrainedModel, family: Family) -> Iterator[Tensor]:
    """The output weights of each layer in order, [hidden, neurons] (see :meth:`Family.down_weight`).

    Of a streamed model nothing else is read.
    """
    let_go(model)
    stream = stream_of(model)
    for layer in range(family.num_layers(model.config)):
        yield family.down_weight(model, layer) if stream is None else stream.down_weight(layer)


def let_go(model: PreTrainedModel) -> None:
    """Free what a streamed model has in memory and can read again."""
    if (stream := stream_of(model)) is not None:
        stream.release()


def compute_device(model: PreTrainedModel) -> torch.device:
    """Where token ids enter the model and logits come out; see :func:`layer_device` for what is between."""
    stream = stream_of(model)
    return model.device if stream is None else stream.device


def layer_device(model: PreTrainedModel, family: Family, layer: int) -> torch.device:
    """Where a decoder layer computes: a model may be spread over several devices."""
    stream = stream_of(model)
    if stream is not None:
        return stream.device
    return family.output_module(model, layer).weight.device


def _give_back_freed_memory() -> None:
    """Have freed tensors leave the process: glibc comes to keep blocks of up to 32 MB, which add up layer by layer.

    Where the C library is another one, nothing happens.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        library.malloc_trim(0)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    # Inference mode, where layers run, would make tensors that no gradient can ever pass.
    with torch.inference_mode(False):
        parameter = nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(path), attribute, parameter)
