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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedModel

from fbn_prune.data.calibration import Batch
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter, set_features
from fbn_prune.model.checkpoint import Checkpoint
from fbn_prune.model.family import as_config
from fbn_prune.model.layerwise import LayerwiseForward
from fbn_prune.model.modeling_ragged import ragged_class
from fbn_prune.model.spill import Spilled
from fbn_prune.model.surgery import (
    MlpCut,
    cut_of,
    cut_of_parts,
    cut_parts,
    cut_tensor,
    rounded_cut,
)

Part = int | str
"""A decoder layer's number, or the name of an embedding."""

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


class StreamedModel(ModelAdapter):
    """A causal language model in evaluation mode whose weights are read from its checkpoint when they are wanted.

    Parameters
    ----------
    device, dtype
        Where and in what the model computes.
    scratch
        Folder for what is not to stay in memory: cuts, activations and, if `spill_hidden`, hidden states.

    Raises
    ------
    InvalidInput
        A tensor that the model needs is not in the checkpoint, or has another shape.
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
        self._cuts = SpilledCuts(scratch)
        self.cuts = self._cuts  # type: ignore[assignment]
        self._cuts_heads = False
        self._trial: Sequence[MlpCut] | None = None
        self._here: Part | None = None
        self._checkpoint = checkpoint
        self._modules: dict[Part, nn.Module] = dict(enumerate(self.layers))
        self._prefixes: dict[Part, str] = {i: f"{self.family.layers}.{i}." for i in self._modules}
        self._input = self._add(model.get_input_embeddings())
        self._output = self._add(model.get_output_embeddings())
        check_tensors(checkpoint)
        for part, module in self._modules.items():
            for inner in module.modules():
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
        return Spilled(self._scratch)  # reading activations back beats reading all weights again

    def hidden_states(self) -> list[Tensor] | Spilled:
        return self.spill() if self._spill_hidden else []

    def down_weights(self) -> Iterator[Tensor]:
        """Each layer's output weights, [hidden, neurons], read by themselves: they are a small part of the layer."""
        self.release()
        for layer in range(self.num_layers):
            weight = self._value(f"{self._prefixes[layer]}{self.family.output.path}.weight")
            yield weight if self.family.output.neuron_axis == 1 else weight.T

    def logits(
        self, batches: Sequence[Batch], on_batch: Callable[[int], None] = lambda tokens: None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        forward = LayerwiseForward(self, batches)
        said, total = 0, sum(batch.tokens for batch in batches)
        for layer in range(self.num_layers):
            forward.advance()
            on_batch(total * (layer + 1) // self.num_layers - said)
            said = total * (layer + 1) // self.num_layers
        for index, batch in enumerate(batches):
            ids = batch.input_ids.to(self._device)
            # Block by block: the logits of a batch can be larger than all else.
            for hidden, block, valid in zip(
                forward.hidden[index].split(1), ids.split(1), batch.valid.split(1), strict=True
            ):
                yield forward.logits(hidden), block, valid
        self.release()

    def release(self) -> None:
        """Let go of the part in memory, if there is one."""
        if self._here is None:
            return
        module, self._here = self._modules[self._here], None
        for name, parameter in list(module.named_parameters()):
            _set(module, name, torch.empty_like(parameter, device="meta"))
        _give_back_freed_memory()

    def cut(self, layer: int, cut: MlpCut, *, round_to: torch.dtype | None = None) -> None:
        """Cut the next layer that is whole: from now on it computes what the written checkpoint's will.

        The output weights take the values that they have in the checkpoint's own dtype, whatever `round_to` says.
        """
        self.release()
        self.make_place_for_bias([cut])
        self._cuts_heads = self._cuts_heads or cut.heads is not None
        self._cuts.append(rounded_cut(cut, self._checkpoint.storage_dtype))

    @contextmanager
    def _trying(self, cuts: Sequence[MlpCut], round_to: torch.dtype | None) -> Iterator[None]:
        self.release()
        self.make_place_for_bias(cuts)
        self._trial = cuts
        try:
            yield
        finally:
            self._trial = None
            self.release()

    def _bring(self, part: Part) -> None:
        """Have this part in memory, and no other."""
        if self._here == part:
            return
        self.release()
        self._here = part
        prefix = self._prefixes[part]
        for name in [name for name, _ in self._modules[part].named_parameters()]:
            _set(self._modules[part], name, self._value(prefix + name))
        if isinstance(part, int):
            self._set_sizes(part)

    def _set_sizes(self, layer: int) -> None:
        """Bring what a layer's modules say of their sizes in line with the weights that are there now."""
        for projection in self.family.projections:
            set_features(self.module(layer, projection))
        attention = self.family.attention
        if attention is None or not self._cuts_heads:
            return
        for head_projection in attention.projections:
            set_features(self.module(layer, head_projection))
        width = self.family.head_shape(self._checkpoint.config).width
        self.set_head_groups(layer, self.attention_output(layer).weight.shape[1] // width)

    def _add(self, module: nn.Module) -> str:
        name = next(name for name, other in self.model.named_modules() if other is module)
        self._modules[name], self._prefixes[name] = module, f"{name}."
        return name

    def _hook(self, part: Part) -> Any:
        def bring(module: nn.Module, args: tuple[Any, ...]) -> None:
            self._bring(part)

        return bring

    def _load_the_rest(self) -> None:
        for name in [name for name, _ in self.model.named_parameters()]:
            if not name.startswith(tuple(self._prefixes.values())):
                _set(self.model, name, self._value(name))
        for module in self.model.modules():
            for name, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, name, buffer.to(self._device))

    def _value(self, name: str) -> Tensor:
        """A parameter as stored, or as the cut of its layer makes it."""
        checkpoint, family = self._checkpoint, self.family
        stored = checkpoint.stored_name(name)
        if stored is None and name.startswith(self._prefixes[self._output]):  # tied
            stored = checkpoint.stored_name(f"{self._prefixes[self._input]}weight")
        cut = cut_of(family, name, self._cuts if self._trial is None else self._trial)
        if stored is not None and cut is None:
            return checkpoint.read(stored, self._device, self._dtype)
        if stored is None:  # a bias that the cuts bring
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
    head = model.get_output_embeddings()
    outputs = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    for name, parameter in model.named_parameters():
        if model.config.tie_word_embeddings and name in outputs:
            continue  # what it is tied to has been seen
        stored = checkpoint.stored_name(name)
        if stored is None:
            raise InvalidInput(f"{checkpoint.path}: {name} of the model is not in the checkpoint")
        if checkpoint.shape(stored) != tuple(parameter.shape):
            raise InvalidInput(
                f"{checkpoint.path}: {name} has shape {list(checkpoint.shape(stored))}, "
                f"the model needs {list(parameter.shape)}"
            )


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
