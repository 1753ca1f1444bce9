"""What Python code and the command line call: thin functions over :mod:`fbn_prune.runs`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted
from transformers import PreTrainedModel

from fbn_prune.data.given import Dataset
from fbn_prune.errors import InvalidInput
from fbn_prune.model.adapter import ModelAdapter
from fbn_prune.networks.estimator import SpatialICA
from fbn_prune.networks.functional_networks import HUB_Z, FunctionalNetworks
from fbn_prune.networks.interventions import amplified, masked, retained
from fbn_prune.progress import Display, StageClock
from fbn_prune.pruning.criteria import register_criterion
from fbn_prune.recipe import PruningConfig, Recipe, build_recipe
from fbn_prune.runs.live import discover_live, prune_live, time_courses_live
from fbn_prune.runs.prune import run_prune
from fbn_prune.runs.result import PruneResult

__all__ = [
    "FunctionalNetworkICA",
    "FunctionalNetworks",
    "PruneResult",
    "PruningConfig",
    "SpatialICA",
    "amplify_networks",
    "discover",
    "mask_networks",
    "prune",
    "prune_checkpoint",
    "register_criterion",
    "retain_networks",
]


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset = "builtin",
    config: PruningConfig | None = None,
    *,
    display: Display | None = None,
) -> PruneResult:
    """Prune a live transformers model in place: remove MLP neurons and refit the others.

    The model keeps its class and its device; it trains, generates and saves as before. Where the layers keep one width
    (the default layout), `save_pretrained` writes a stock checkpoint. The weights are those that
    :func:`prune_checkpoint` writes for a checkpoint of this model stored in its dtype.

    Parameters
    ----------
    model
        A causal language model of a supported architecture.
    tokenizer
        The model's own.
    dataset
        Calibration text: strings (each a document), a `datasets.Dataset` with a column `text` or `input_ids`, a
        DataLoader of token ids (int64 [blocks, length], or mappings with `input_ids`), or the name of a source as on
        the command line.
    config
        The settings; by default ten functional networks set the size.
    display
        Shows progress; by default nothing is shown.

    Returns
    -------
    PruneResult
        The figures before and after; `result.model` is the pruned model.

    Raises
    ------
    InvalidInput
        The model, the data or a setting cannot be used; nothing has been changed.
    FbnPruneError
        The pruned model does not work.

    References
    ----------
    arXiv 2508.05239 (pruning by preserving functional networks); the choice of neurons and the refit are the optimal
    brain surgeon on groups (:mod:`fbn_prune.pruning.second_order`).

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from fbn_prune import PruningConfig, prune
    >>> from fbn_prune.data.builtin import model_path
    >>> model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
    >>> config = PruningConfig(sparsity=0.5, tokens=2048)
    >>> result = prune(model, tokenizer, "builtin", config)
    >>> result.widths == [model.config.intermediate_size] * 6
    True
    """
    config = config or PruningConfig()
    return prune_live(model, tokenizer, dataset, config, StageClock(display))


def prune_checkpoint(
    path: str | Path | None = None,
    output: str | Path | None = None,
    dataset: str | Sequence[str] = ("builtin",),
    config: PruningConfig | None = None,
    *,
    recipe: Recipe | None = None,
    display: Display | None = None,
    **places: Any,
) -> PruneResult:
    """Prune a checkpoint on disk and write a smaller one: streamed where memory is short, resumed where it broke off.

    Parameters
    ----------
    path
        A folder of safetensors, or an id on the Hugging Face hub.
    output
        The folder to write; it must not exist.
    dataset
        One or more names of sources: files, folders, ``hf:dataset``, ``builtin``.
    config
        The settings of the method.
    recipe
        All of the above in one, in place of them.
    display
        Shows progress; by default nothing is shown.
    **places
        Further keys of a recipe, such as `device`, `dtype`, `memory_budget`, `overwrite` or `work_dir`.

    Returns
    -------
    PruneResult

    Raises
    ------
    InvalidInput
        Something cannot be used as given; nothing has been written.
    FbnPruneError
        The work failed. The same call goes on from the last finished stage.
    """
    if recipe is None:
        if path is None or output is None:
            raise InvalidInput("prune_checkpoint needs a checkpoint and an output, or a recipe")
        settings = (config or PruningConfig()).model_dump()
        named = {"model": str(path), "output": Path(output), "calibration": dataset}
        recipe = build_recipe({**settings, **named, **places}, where="prune_checkpoint")
    return run_prune(recipe, StageClock(display))


def discover(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset = "builtin",
    config: PruningConfig | None = None,
    *,
    recurrence: bool = False,
    display: Display | None = None,
) -> FunctionalNetworks:
    """Find the functional networks of a live model (arXiv 2502.20408); the model is not changed.

    Parameters
    ----------
    model, tokenizer, dataset, config, display
        See :func:`prune`; `networks`, `network_tokens`, `scope` and `seed` of the settings are read.
    recurrence
        Also find out which networks come back in other text and from other starts.

    Raises
    ------
    InvalidInput
        The model, the data or a setting cannot be used.
    """
    config = config or PruningConfig()
    clock = StageClock(display)
    return discover_live(model, tokenizer, dataset, config, clock, recurrence=recurrence)


class FunctionalNetworkICA(BaseEstimator):
    """Functional networks of a language model, as an estimator: fit on a model and text, transform text.

    Parameters
    ----------
    n_components
        How many networks to find.
    random_state
        Seed of the sample of tokens and of the solver's start.
    network_tokens
        Tokens that the networks are found on.
    scope
        "global": one ICA over the neurons of all layers (arXiv 2502.20408); "layer": one for each layer
        (arXiv 2508.05239).

    Attributes
    ----------
    networks_
        The :class:`FunctionalNetworks` that were found.
    components_
        Their maps, float32 [networks, neurons of all layers], z-scored.

    Examples
    --------
    >>> from transformers import AutoModelForCausalLM, AutoTokenizer
    >>> from fbn_prune import FunctionalNetworkICA
    >>> from fbn_prune.data.builtin import model_path
    >>> model = AutoModelForCausalLM.from_pretrained(model_path(), dtype="float32")
    >>> tokenizer = AutoTokenizer.from_pretrained(model_path())
    >>> ica = FunctionalNetworkICA(n_components=4, network_tokens=512).fit(model, tokenizer)
    >>> ica.transform(["def f(x): return x"]).shape[1]
    4
    """

    def __init__(
        self,
        n_components: int = 64,
        *,
        random_state: int = 0,
        network_tokens: int = 8192,
        scope: str = "global",
    ) -> None:
        self.n_components = n_components
        self.random_state = random_state
        self.network_tokens = network_tokens
        self.scope = scope

    def fit(
        self, model: PreTrainedModel, tokenizer: Any, dataset: Dataset = "builtin"
    ) -> FunctionalNetworkICA:
        """Find the networks of a model on text; see :func:`prune` for what `dataset` may be.

        Raises
        ------
        InvalidInput
            The model, the data or a parameter cannot be used.
        """
        self.networks_ = discover(model, tokenizer, dataset, self._config())
        return self._of(model, tokenizer)

    def transform(
        self, dataset: Dataset, model: PreTrainedModel | None = None, tokenizer: Any = None
    ) -> NDArray[np.float64]:
        """Time courses of the networks: how active each is at every token.

        Parameters
        ----------
        dataset
            See :func:`prune`; all of it is read.
        model, tokenizer
            Of the same shape as those of :meth:`fit`; by default those.

        Returns
        -------
        float64 [tokens, networks], in the order of the text; special tokens that open a block are among them.
        """
        check_is_fitted(self, "networks_")
        model = model or getattr(self, "_model", None)
        tokenizer = tokenizer or getattr(self, "_tokenizer", None)
        if model is None or tokenizer is None:
            raise InvalidInput("networks from a file: give transform a model and its tokenizer")
        return time_courses_live(model, tokenizer, dataset, self.networks_).numpy()

    @property
    def components_(self) -> NDArray[np.float32]:
        return self.networks_.maps.numpy()

    def save(self, path: str | Path) -> None:
        """Write the networks as `networks.safetensors` files hold them; the model is not part of it."""
        check_is_fitted(self, "networks_")
        self.networks_.save(path)

    @classmethod
    def load(cls, path: str | Path) -> FunctionalNetworkICA:
        """The estimator of a file that :meth:`save` or the `discover` command wrote.

        Raises
        ------
        InvalidInput
            The file is no artifact of functional networks.
        """
        networks = FunctionalNetworks.load(path)
        header = networks.header
        found = cls(
            len(networks.maps),
            random_state=int(header.get("seed", 0)),
            network_tokens=int(header.get("tokens", 8192)),
            scope=str(header.get("scope", "global")),
        )
        found.networks_ = networks
        return found

    def _of(self, model: PreTrainedModel, tokenizer: Any) -> FunctionalNetworkICA:
        self._model, self._tokenizer = model, tokenizer
        return self

    def _config(self) -> PruningConfig:
        return PruningConfig(
            networks=self.n_components,
            network_tokens=self.network_tokens,
            tokens=max(self.network_tokens, self.n_components + 1),
            scope=self.scope,  # type: ignore[arg-type]
            seed=self.random_state,
            report_networks=True,
            keep_networks=1,
        )


def mask_networks(
    model: PreTrainedModel, networks: FunctionalNetworks, ids: Sequence[int], *, z: float = HUB_Z
) -> AbstractContextManager[PreTrainedModel]:
    """Silence the neurons of some networks while the context lasts (the causal test of arXiv 2502.20408).

    Parameters
    ----------
    model
        The model that the networks were found in.
    ids
        Numbers of the networks, from 0.
    z
        Neurons with an absolute z-score of at least this belong to a network: 3 for its hubs, 2 for its members.

    Raises
    ------
    InvalidInput
        A network does not exist, or the model has other widths.

    Examples
    --------
    >>> with mask_networks(model, networks, [2, 5]):  # doctest: +SKIP
    ...     model(**inputs)
    """
    return _changed(model, lambda adapter: masked(adapter, _neurons(networks, ids, z)))


def retain_networks(
    model: PreTrainedModel, networks: FunctionalNetworks, ids: Sequence[int], *, z: float = HUB_Z
) -> AbstractContextManager[PreTrainedModel]:
    """Silence all neurons but those of some networks; parameters and errors as in :func:`mask_networks`."""
    return _changed(model, lambda adapter: retained(adapter, _neurons(networks, ids, z)))


def amplify_networks(
    model: PreTrainedModel,
    networks: FunctionalNetworks,
    ids: Sequence[int],
    *,
    factor: float = 2.0,
    z: float = HUB_Z,
) -> AbstractContextManager[PreTrainedModel]:
    """Multiply the activations of some networks' neurons by `factor`; the rest as in :func:`mask_networks`."""
    return _changed(model, lambda adapter: amplified(adapter, _neurons(networks, ids, z), factor))


def _neurons(networks: FunctionalNetworks, ids: Sequence[int], z: float) -> list[torch.Tensor]:
    return networks.by_layer(networks.union(ids, z))


@contextmanager
def _changed(model: PreTrainedModel, change: Any) -> Iterator[PreTrainedModel]:
    with change(ModelAdapter(model)):
        yield model
