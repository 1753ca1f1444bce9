"""The Python API: what `import fbn_prune` offers, and one function for every command of the command line.

All functions are thin layers over :mod:`fbn_prune.runs`. They print nothing; a `display` shows progress. The module is
long because each function documents all its parameters, and because names that load torch are imported on first use.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fbn_prune.errors import InvalidInput
from fbn_prune.progress import Display, StageClock
from fbn_prune.recipe import PruningConfig, Recipe, build_recipe
from fbn_prune.runs.early_checks import (
    check_labels,
    check_measured,
    check_models,
    check_recipe,
    check_results,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fbn_prune.data.given import Dataset
    from fbn_prune.export.hub import check_push, push_to_hub
    from fbn_prune.networks.cards import network_cards
    from fbn_prune.networks.estimator import SpatialICA
    from fbn_prune.networks.functional_networks import FunctionalNetworks
    from fbn_prune.networks.recurrence import Recurrence, recurrence
    from fbn_prune.pruning.criteria import register_criterion
    from fbn_prune.pruning.recovery.gain import Recovery
    from fbn_prune.runs.ablate import AblationPlan, AblationResult
    from fbn_prune.runs.compare import Comparison
    from fbn_prune.runs.convert import convert, dequantize, write_bundle
    from fbn_prune.runs.dry_run import Plan
    from fbn_prune.runs.estimator import FunctionalNetworkICA
    from fbn_prune.runs.evaluate import Evaluation, HarnessOptions, evaluate
    from fbn_prune.runs.evaluation_card import evaluation_table, write_evaluation_card
    from fbn_prune.runs.fingerprint import Lineage
    from fbn_prune.runs.live import amplify_networks, mask_networks, retain_networks
    from fbn_prune.runs.probe import ProbeResult
    from fbn_prune.runs.result import PruneResult, tool_version
    from fbn_prune.runs.study import Ranking
    from fbn_prune.runs.trim_vocabulary import VocabularyResult, trim_vocabulary
    from fbn_prune.runs.unfinished import UnfinishedRun, clean_runs, unfinished_runs

_PLACES = {
    "fbn_prune.export.hub": ("check_push", "push_to_hub"),
    "fbn_prune.networks.cards": ("network_cards",),
    "fbn_prune.networks.estimator": ("SpatialICA",),
    "fbn_prune.networks.functional_networks": ("FunctionalNetworks",),
    "fbn_prune.networks.recurrence": ("Recurrence", "recurrence"),
    "fbn_prune.pruning.criteria": ("register_criterion",),
    "fbn_prune.pruning.recovery.gain": ("Recovery",),
    "fbn_prune.runs.ablate": ("AblationPlan", "AblationResult"),
    "fbn_prune.runs.compare": ("Comparison",),
    "fbn_prune.runs.convert": ("convert", "dequantize", "write_bundle"),
    "fbn_prune.runs.dry_run": ("Plan",),
    "fbn_prune.runs.estimator": ("FunctionalNetworkICA",),
    "fbn_prune.runs.evaluate": ("Evaluation", "HarnessOptions", "evaluate"),
    "fbn_prune.runs.evaluation_card": ("evaluation_table", "write_evaluation_card"),
    "fbn_prune.runs.fingerprint": ("Lineage",),
    "fbn_prune.runs.live": ("amplify_networks", "mask_networks", "retain_networks"),
    "fbn_prune.runs.probe": ("ProbeResult",),
    "fbn_prune.runs.result": ("PruneResult", "tool_version"),
    "fbn_prune.runs.study": ("Ranking",),
    "fbn_prune.runs.trim_vocabulary": ("VocabularyResult", "trim_vocabulary"),
    "fbn_prune.runs.unfinished": ("UnfinishedRun", "clean_runs", "unfinished_runs"),
}
"""Modules imported when one of their names is first used: most load torch, and a refusal must not wait for it."""

_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


__all__ = [
    "AblationPlan",
    "AblationResult",
    "Comparison",
    "Evaluation",
    "FunctionalNetworkICA",
    "FunctionalNetworks",
    "HarnessOptions",
    "Lineage",
    "Plan",
    "ProbeResult",
    "PruneResult",
    "PruningConfig",
    "Ranking",
    "Recovery",
    "Recurrence",
    "SpatialICA",
    "UnfinishedRun",
    "VocabularyResult",
    "ablate",
    "amplify_networks",
    "check_measured",
    "check_models",
    "check_push",
    "check_recipe",
    "check_results",
    "clean_runs",
    "compare",
    "convert",
    "dequantize",
    "discover",
    "discover_checkpoint",
    "evaluate",
    "evaluation_table",
    "fingerprint",
    "mask_networks",
    "network_cards",
    "predict",
    "probe",
    "prune",
    "prune_checkpoint",
    "push_to_hub",
    "rank",
    "recurrence",
    "register_criterion",
    "retain_networks",
    "tool_version",
    "trim_vocabulary",
    "unfinished_runs",
    "write_bundle",
    "write_evaluation_card",
    "write_networks_page",
    "write_report",
]


def prune(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset = "builtin",
    config: PruningConfig | None = None,
    *,
    display: Display | None = None,
) -> PruneResult:
    """Prune a transformers model in memory: remove MLP neurons and refit the output weights of the others.

    The model is changed in place. It keeps its class and device, and trains, generates and saves as before; with the
    default layout (one width for all layers) `save_pretrained` writes a checkpoint that every loader accepts. The
    weights equal those that :func:`prune_checkpoint` writes for the same model stored in the same dtype.

    Parameters
    ----------
    model
        Causal language model of a supported architecture.
    tokenizer
        Tokenizer of the model.
    dataset
        Calibration text: a sequence of strings (documents), a `datasets.Dataset` with a column `text` or `input_ids`,
        a DataLoader of token ids (int64 [blocks, length], or mappings with `input_ids`), or the name of a source as
        on the command line.
    config
        Settings. Default: the members of ten functional networks set the size.
    display
        Shows progress. Default: nothing is shown.

    Returns
    -------
    PruneResult
        Sizes and perplexities before and after; `result.model` is the pruned model.

    Raises
    ------
    InvalidInput
        If the model, the data or a setting cannot be used; the model is unchanged.
    FbnPruneError
        If the pruned model does not work.

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
    from fbn_prune.runs.live import prune_live

    return prune_live(model, tokenizer, dataset, config or PruningConfig(), StageClock(display))


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
    """Prune a checkpoint on disk and write a smaller one.

    A model that does not fit into memory is read layer by layer. After a failure, the same call continues from the
    last finished stage.

    Parameters
    ----------
    path
        Folder of safetensors files, or an id on the Hugging Face Hub.
    output
        Folder to write; it must not exist.
    dataset
        Names of one or more calibration sources: files, folders, ``hf:dataset``, ``builtin``.
    config
        Settings of the method.
    recipe
        A complete recipe, used instead of all other parameters.
    display
        Shows progress. Default: nothing is shown.
    **places
        Further recipe keys, such as `device`, `dtype`, `memory_budget`, `overwrite` or `work_dir`.

    Returns
    -------
    PruneResult
        Sizes and perplexities before and after.

    Raises
    ------
    InvalidInput
        If an argument cannot be used; nothing is written.
    FbnPruneError
        If the work fails; finished stages are kept in the work directory.
    """
    if recipe is None:
        if path is None or output is None:
            raise InvalidInput("prune_checkpoint needs a checkpoint and an output, or a recipe")
        settings = (config or PruningConfig()).model_dump()
        named = {"model": str(path), "output": Path(output), "calibration": dataset}
        recipe = build_recipe({**settings, **named, **places}, where="prune_checkpoint")
    check_recipe(recipe, mixtures=True)
    from fbn_prune.runs.main_job import run_prune

    return run_prune(recipe, StageClock(display))


def predict(recipe: Recipe) -> Plan:
    """Predict the size, memory and time of a run from the checkpoint's headers, as `--dry-run` does.

    Raises
    ------
    InvalidInput
        If the run itself would refuse the recipe.
    """
    check_recipe(recipe, mixtures=True)
    from fbn_prune.runs import main_job

    return main_job.predict(recipe)


def discover(
    model: PreTrainedModel,
    tokenizer: Any,
    dataset: Dataset = "builtin",
    config: PruningConfig | None = None,
    *,
    recurrence: bool = False,
    display: Display | None = None,
) -> FunctionalNetworks:
    """Find the functional networks of a transformers model in memory (arXiv 2502.20408) without changing it.

    Parameters
    ----------
    model, tokenizer, dataset, config, display
        See :func:`prune`. Of the settings, `networks`, `network_tokens`, `scope` and `seed` are used.
    recurrence
        Also measure which networks recur on other text and with other seeds.

    Raises
    ------
    InvalidInput
        If the model, the data or a setting cannot be used.
    """
    from fbn_prune.runs.live import discover_live

    config, clock = config or PruningConfig(), StageClock(display)
    return discover_live(model, tokenizer, dataset, config, clock, recurrence=recurrence)


def discover_checkpoint(
    recipe: Recipe, *, display: Display | None = None
) -> tuple[FunctionalNetworks, Path]:
    """Find the functional networks of a checkpoint, measure their recurrence, and write them to the recipe's output.

    Returns
    -------
    networks, path
        The networks and the path of their `networks.safetensors`.

    Raises
    ------
    InvalidInput
        If the recipe has no output, or names something that cannot be used.
    """
    if recipe.output is None:
        raise InvalidInput("--output is missing: name the folder to write")
    check_recipe(recipe, mixtures=True)
    from fbn_prune.runs.discover import run_discovery

    return run_discovery(recipe, StageClock(display))


def rank(recipe: Recipe, *, display: Display | None = None) -> Ranking:
    """Score the networks of a checkpoint by the recipe's `rank` rule and sort them, strongest first.

    Raises
    ------
    InvalidInput
        If the recipe names something that cannot be used, or the model does not fit into memory.
    """
    check_recipe(recipe, mixtures=True)
    from fbn_prune.runs.study import run_rank

    return run_rank(recipe, StageClock(display))


def ablate(
    recipe: Recipe,
    plan: AblationPlan | None = None,
    tasks: Sequence[str] = (),
    options: HarnessOptions | None = None,
    *,
    display: Display | None = None,
) -> AblationResult:
    """Mask, retain or amplify networks in the running model, and measure the effect beside random sets of neurons.

    Parameters
    ----------
    recipe
        The model, its networks (or how to find them) and the calibration text.
    plan
        Which networks to change, how, and the texts to measure on. Default: mask each network alone.
    tasks
        Harness tasks to measure as well; see :func:`evaluate`.
    options
        Options of the harness for these tasks.
    display
        Shows progress. Default: nothing is shown.

    Raises
    ------
    InvalidInput
        If a network, a text, a task or the recipe cannot be used, or the model does not fit into memory.
    FbnPruneError
        If tasks are given and lm-evaluation-harness is missing.
    """
    check_recipe(recipe, mixtures=True)
    check_measured(() if plan is None else plan.texts, tasks)
    from fbn_prune.runs.ablate import AblationPlan, run_ablation
    from fbn_prune.runs.evaluate import HarnessOptions, measure_on_tasks

    measure = measure_on_tasks(tasks, options or HarnessOptions()) if tasks else None
    return run_ablation(recipe, plan or AblationPlan(), StageClock(display), measure)


def probe(
    recipe: Recipe, labels: Path, *, splits: int = 5, display: Display | None = None
) -> ProbeResult:
    """Tell the labels of texts from the mean activity of 1, 2 and 5 networks, and of as many features of controls.

    Parameters
    ----------
    recipe
        The model, its networks (or how to find them) and the calibration text that they are found on.
    labels
        File with rows of `text` and `label`: JSON lines, CSV or Parquet.
    splits
        Random splits of the texts: on one half features are chosen and a logistic regression is fitted, on the other
        it is judged.
    display
        Shows progress. Default: nothing is shown.

    Raises
    ------
    InvalidInput
        If the labels or the recipe cannot be used, or the model does not fit into memory.
    """
    check_labels(labels)
    check_recipe(recipe)
    from fbn_prune.runs.probe import run_probe

    return run_probe(recipe, labels, StageClock(display), splits=splits)


def fingerprint(recipe: Recipe, other: str, *, display: Display | None = None) -> Lineage:
    """Compare the functional networks of two models by their activity on the same text (arXiv 2601.22692).

    Parameters
    ----------
    recipe
        One model, the text, and how to find networks.
    other
        The other model: a checkpoint folder, GGUF file, Hub id or "builtin". Its shape and tokenizer may differ.
    display
        Shows progress. Default: nothing is shown.

    Raises
    ------
    InvalidInput
        If a model or the text cannot be used, or a model does not fit into memory.
    """
    check_recipe(recipe)
    check_recipe(recipe.model_copy(update={"model": other}))
    from fbn_prune.runs.fingerprint import run_fingerprint

    return run_fingerprint(recipe, other, StageClock(display))


def compare(
    recipe: Recipe,
    criteria: Sequence[str] = (),
    kept: Sequence[float] = (0.7, 0.5, 0.3),
    path: Path | None = None,
    *,
    display: Display | None = None,
) -> Comparison:
    """Measure the held-out perplexity of every criterion at several budgets, all from one calibration sample.

    Parameters
    ----------
    recipe
        The model, its calibration text and the settings of the cut.
    criteria
        Names of criteria. Default: all built-in ones.
    kept
        Budgets: shares of neurons to keep (between 0 and 1), or whole numbers of networks whose members set the size.
    path
        JSON file for the results. It is updated after each measurement, and an existing one is continued. A plot is
        written beside it.
    display
        Shows progress. Default: nothing is shown.

    Raises
    ------
    InvalidInput
        If a criterion, a budget, the file or the recipe cannot be used, or the model does not fit into memory.
    """
    check_recipe(recipe, mixtures=True)
    check_results(path)
    from fbn_prune.runs.comparing import run_any_comparison

    return run_any_comparison(recipe, criteria, kept, path, StageClock(display))


def write_report(
    folder: Path,
    output: Path,
    *,
    compare: Path | None = None,
    ablate: Path | None = None,
    evaluate: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write one self-contained HTML page about a finished run.

    Parameters
    ----------
    folder
        Output of :func:`prune_checkpoint` or :func:`discover_checkpoint`.
    output
        HTML file to write.
    compare, ablate, evaluate
        JSON results of these commands, to be added to the page.
    overwrite
        Replace an existing file.

    Raises
    ------
    InvalidInput
        If the output exists, or an input is missing or damaged.
    """
    if output.exists() and not overwrite:
        raise InvalidInput(f"the output {output} exists; give another, or --overwrite")
    if not output.resolve().parent.is_dir():
        raise InvalidInput(f"{output}: there is no folder {output.resolve().parent}: make it first")
    from fbn_prune.export.report import facts, page  # loads matplotlib

    page.write_report(
        facts.read_facts(folder, compare=compare, ablate=ablate, evaluate=evaluate), output
    )


def write_networks_page(
    networks: FunctionalNetworks,
    output: Path,
    *,
    ablate: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write one self-contained HTML page to browse networks by word, layer and effect.

    Parameters
    ----------
    networks
        Networks of :func:`discover` or of a file.
    output
        HTML file to write.
    ablate
        JSON result of `ablate` on these networks: what each costs when it is silent.
    overwrite
        Replace an existing file.

    Raises
    ------
    InvalidInput
        If the output exists, or the result is missing, damaged or of other networks.
    """
    from fbn_prune.export.report.browser import write_browser

    write_browser(networks, output, ablation=ablate, overwrite=overwrite)
