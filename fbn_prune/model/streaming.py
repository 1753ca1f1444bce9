"""Run a model that is larger than memory: its weights stay in the checkpoint and are read one part at a time.

A part is a decoder layer, the input embedding or the output embedding; norms, other small tensors and tables such as
the rotary ones are always in memory. The model is the architecture's own, built on the meta device. Before a part
runs, its tensors are read from the safetensors and those of the previous part are freed. Running all data through one
layer before the next (:mod:`fbn_prune.model.layerwise`) reads each weight once.

A cut layer is not kept in memory either: each time, it is read and cut again by the function that also makes the
tensors of the written checkpoint.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.model import building, remedies
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.model.attention_blocks import trying_head_groups
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import MOST_LAYERS
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.modeling_ragged import set_features
from fbn_prune.model.spill import Spilled
from fbn_prune.model.surgery import (
    MlpCut,
    cut_of,
    cut_of_parts,
    cut_parts,
    cut_tensor,
    is_removed,
    rounded_cut,
)

Part = int | str
"""A decoder layer's number, or the name of an embedding."""

_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES = -3, 2**21


Cut = TypeVar("Cut")


class SpilledCuts(Sequence[Cut]):
    """The cuts of the first layers, on disk except for the most recently read one.

    Parameters
    ----------
    folder
        The folder of the file.
    parts_of, of_parts
        Take a cut apart into tensors by name, and put it together again.
    """

    def __init__(
        self,
        folder: Path,
        parts_of: Callable[[Cut], Mapping[str, Tensor]],
        of_parts: Callable[[Mapping[str, Tensor]], Cut],
    ) -> None:
        self._parts_of, self._of_parts = parts_of, of_parts
        self._tensors = Spilled(folder)
        self._places: list[dict[str, int]] = []
        self._last: tuple[int, Cut] | None = None

    def append(self, cut: Cut) -> None:
        places = {}
        for name, part in self._parts_of(cut).items():
            places[name] = len(self._tensors)
            self._tensors.append(part)
        self._places.append(places)

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Cut: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Cut]: ...
    def __getitem__(self, index: int | slice) -> Cut | Sequence[Cut]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        if self._last is None or self._last[0] != index:
            parts = {name: self._tensors[place] for name, place in self._places[index].items()}
            self._last = index, self._of_parts(parts)
        return self._last[1]


def spilled_cuts(folder: Path) -> SpilledCuts[MlpCut]:
    """Return an empty list of cuts of MLPs on disk."""
    return SpilledCuts(folder, cut_parts, cut_of_parts)


class StreamedModel(ModelAdapter):
    """A causal language model in evaluation mode that reads its weights from the checkpoint on demand.

    Parameters
    ----------
    checkpoint
        The checkpoint.
    device, dtype
        The device and dtype in which the model computes.
    scratch
        Folder for temporary files with cuts, activations and, if `spill_hidden`, hidden states.
    spill_hidden
        Keep hidden states on disk instead of in memory.

    Raises
    ------
    InvalidInput
        A tensor of the model is missing from the checkpoint, or has another shape there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        scratch: Path,
        spill_hidden: bool = False,
    ) -> None:
        model = skeleton(checkpoint, dtype)
        model.config.use_cache = False
        super().__init__(model.eval(), checkpoint.family)
        self._device, self._dtype = device, dtype
        self._scratch, self._spill_hidden = scratch, spill_hidden
        self._cuts = spilled_cuts(scratch)
        self.cuts = self._cuts  # type: ignore[assignment]
        self._cuts_heads = False
        self._trial_heads = ExitStack()
        self._trial: Sequence[MlpCut] | None = None
        self._alone: int | None = None
        self._loaded: Part | None = None
        self._checkpoint = checkpoint
        self._modules: dict[Part, dict[str, nn.Module]] = {}
        numbers = iter(range(MOST_LAYERS))
        for layer, group in enumerate(self.decoder_layers):
            self._modules[layer] = {
                f"{self.family.layers}.{next(numbers)}.": module for module in group
            }
        self._input = self._add(model.get_input_embeddings())
        self._output = self._add(model.get_output_embeddings())
        self._open_tensors()
        for part, modules in self._modules.items():
            for inner in (inner for module in modules.values() for inner in module.modules()):
                if list(inner.parameters(recurse=False)):
                    inner.register_forward_pre_hook(self._hook(part))
        self._load_the_rest()

    @property
    def dtype(self) -> torch.dtype:
        return self._dtype

    @property
    def device(self) -> torch.device:
        return self._device

    def layer_device(self, layer: int) -> torch.device:
        return self._device

    def load_layer(self, layer: int) -> None:
        self._bring(layer)

    def spill(self) -> Spilled:
        return Spilled(
            self._scratch
        )  # reading activations is faster than reading all weights again

    def hidden_states(self) -> list[Tensor] | Spilled:
        return self.spill() if self._spill_hidden else []

    def down_weights(self) -> Iterator[Tensor]:
        """Yield each layer's output weights, [hidden, neurons], without reading the rest of the layer."""
        self.release()
        for layer in range(self.num_layers):
            place = f"{self.family.layers}.{self.family.decoder_layer(layer)}"
            weight = self._value(f"{place}.{self.family.output.path}.weight")
            yield weight if self.family.output.neuron_axis == 1 else weight.T

    def logits(
        self, batches: Sequence[Batch], on_batch: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        forward = LayerwiseForward(self, batches)
        reported, total = 0, sum(batch.tokens for batch in batches)
        for layer in range(self.num_layers):
            forward.advance()
            on_batch(total * (layer + 1) // self.num_layers - reported)
            reported = total * (layer + 1) // self.num_layers
        for index, batch in enumerate(batches):
            ids = batch.input_ids.to(self._device)
            # One block at a time, because the logits of a whole batch can be the largest tensor of the run.
            for hidden, block, valid in zip(
                forward.hidden[index].split(1), ids.split(1), batch.valid.split(1), strict=True
            ):
                yield forward.logits(hidden), block, valid
        self.release()

    def release(self) -> None:
        """Free the weights of the loaded part, if there is one."""
        if self._loaded is None:
            return
        self._trial_heads.close()
        modules, self._loaded = self._modules[self._loaded], None
        for module in modules.values():
            for name, parameter in list(module.named_parameters()):
                _set(module, name, torch.empty_like(parameter, device="meta"))
        _give_back_freed_memory()

    def cut(self, layer: int, cut: MlpCut, *, round_to: torch.dtype | None = None) -> None:
        """Cut the first layer that is still whole; it then computes what the written checkpoint will.

        The new output weights are rounded to the checkpoint's dtype; `round_to` is ignored.
        """
        self.release()
        self.make_place_for_bias([cut])
        if cut.heads is not None:
            self._cuts_heads = True
            if len(cut.heads.kept) == 0:
                self.set_head_groups(layer, 0)
        self._cuts.append(rounded_cut(cut, self._checkpoint.storage_dtype))

    @contextmanager
    def _trying(
        self, cuts: Sequence[MlpCut], alone: int | None, round_to: torch.dtype | None
    ) -> Iterator[None]:
        self.release()
        self.make_place_for_bias(cuts if alone is None else [cuts[alone]])
        self._trial, self._alone = cuts, alone
        try:
            yield
        finally:
            self._trial = self._alone = None
            self.release()

    def _bring(self, part: Part) -> None:
        """Load this part's weights, after freeing those of the part loaded before."""
        if self._loaded == part:
            return
        self.release()
        self._loaded = part
        tried = self._trial if isinstance(part, int) and self._alone in (None, part) else None
        for prefix, module in self._modules[part].items():
            names = [prefix + name for name, _ in module.named_parameters()]
            needed = [name for name in names if not is_removed(self.family, name, tried or ())]
            for name, value in self._values(needed):
                _set(module, name.removeprefix(prefix), value)
        if isinstance(part, int):
            self._set_sizes(part)
            if tried is not None and (heads := tried[part].heads) is not None:
                groups = trying_head_groups(self, part, len(heads.kept))
                self._trial_heads.enter_context(groups)

    def _set_sizes(self, layer: int) -> None:
        """Set the size attributes of a layer's modules to the shapes of the loaded weights."""
        for projection in self.family.projections:
            set_features(self.module(layer, projection))
        attention = self.family.attention
        if attention is None or not list(self.attention_module(layer).parameters()):
            return
        for head_projection in attention.projections:
            set_features(self.module(layer, head_projection))
        if self._cuts_heads:
            width = self.family.head_shape(self._checkpoint.config).width
            self.set_head_groups(layer, self.attention_output(layer).weight.shape[1] // width)

    def _add(self, module: nn.Module) -> str:
        name = next(name for name, other in self.model.named_modules() if other is module)
        self._modules[name] = {f"{name}.": module}
        return name

    def _hook(self, part: Part) -> Any:
        def bring(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._bring(part)

        return bring

    def _load_the_rest(self) -> None:
        parts = tuple(prefix for modules in self._modules.values() for prefix in modules)
        names = [name for name, _ in self.model.named_parameters() if not name.startswith(parts)]
        for name, value in self._values(names):
            _set(self.model, name, value)
        for name, buffer in list(self.model.named_buffers()):
            _set_buffer(self.model, name, buffer.to(self._device))
        for name, value in self._stored_buffers():
            _set_buffer(self.model, name, value)

    def _open_tensors(self) -> None:
        """Check that the checkpoint has all tensors of the model."""
        check_tensors(self._checkpoint)

    def _values(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters by name."""
        for name in names:
            yield name, self._value(name)

    def _stored_buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers that the checkpoint stores, by name."""
        for path, module in self.model.named_modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                own = f"{path}.{name}".removeprefix(".")
                stored = self._checkpoint.stored_name(own)
                if stored is not None and name not in module._non_persistent_buffers_set:
                    dtype = self._dtype if buffer.is_floating_point() else buffer.dtype
                    yield own, self._checkpoint.read(stored, self._device, dtype)

    def _value(self, name: str) -> Tensor:
        """A parameter's values: as stored, or after the cut of its layer."""
        checkpoint, family = self._checkpoint, self.family
        stored = checkpoint.stored_name(name)
        if stored is None and name.startswith(f"{self._output}."):  # tied
            stored = checkpoint.stored_name(f"{self._input}.weight")
        cut = cut_of(family, name, self._cuts if self._trial is None else self._trial)
        if self._trial is not None and self._alone not in (None, family.layer_of(name)):
            cut = None
        if stored is not None and cut is None:
            return checkpoint.read(stored, self._device, self._dtype)
        if stored is None:  # a bias that the cuts add
            location = family.locate(name)
            assert location is not None
            config = checkpoint.config
            width = family.widths(config)[location.layer]
            shape = family.tensor_shape(location, family.hidden_size(config), width)
            tensor = torch.zeros(shape, dtype=checkpoint.storage_dtype)
        else:
            tensor = checkpoint.tensor(stored)
        if cut is not None:
            tensor = cut_tensor(family, checkpoint.config, name, tensor, cut)
        return tensor.to(self._device, self._dtype)


def skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """Return a checkpoint's model on the meta device, without reading weights."""
    return building.skeleton(checkpoint.config, checkpoint.family, dtype)


def check_tensors(checkpoint: Checkpoint) -> None:
    """Check a checkpoint's headers against the parameters of its architecture.

    Raises
    ------
    InvalidInput
        A parameter is missing from the checkpoint, or has another shape there.
    """
    model = skeleton(checkpoint, checkpoint.storage_dtype)
    head = model.get_output_embeddings()
    outputs = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    for name, parameter in model.named_parameters():
        if model.config.tie_word_embeddings and name in outputs:
            continue  # the same tensor as the input embedding
        stored = checkpoint.stored_name(name)
        if stored is None:
            raise InvalidInput(
                f"{checkpoint.path}: the model's {name} is not in the checkpoint"
                f"{remedies.missing_tensor(checkpoint.tensors)}"
            )
        if checkpoint.shape(stored) != tuple(parameter.shape):
            raise InvalidInput(
                f"{checkpoint.path}: {name} has shape {list(checkpoint.shape(stored))}, "
                f"the model needs {list(parameter.shape)}; take config.json and the weights from one model"
            )


def _give_back_freed_memory() -> None:
    """Return freed memory to the system: glibc otherwise keeps blocks of up to 32 MB, which add up over the layers.

    With other C libraries this does nothing.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES)
        library.malloc_trim(0)


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(path), attribute, value)


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    # Layers run in inference mode; parameters made there could never have gradients.
    with torch.inference_mode(False):
        parameter = nn.Parameter(value, requires_grad=False)
    setattr(module.get_submodule(path), attribute, parameter)
