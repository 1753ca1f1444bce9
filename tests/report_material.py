"""An output folder and results of the other commands, made up, for the tests of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from fbn_prune.networks.functional_networks import FunctionalNetworks
from fbn_prune.networks.recurrence import connectivity

LAYERS, WIDTH, NETWORKS, KEPT = 6, 64, 20, 4
HOSTILE = (
    '<script>document.title="owned"</script>',
    '<img src="http://example.invalid/x" onerror="document.title=1">',
    "</mark></p></body><h1>out</h1>",
    "{{ 7 * 7 }} {% raw %}",
    "&lt;b&gt; & \" ' ` $x$ $$",
    "a\u202ereversed\x00\x1b[31m\ud800 line\nline",
    "averylongwordwithoutanyspaces" * 30,
    "漢字 العربية עברית 🙂",
)


def write_material(folder: Path) -> dict[str, Path]:
    """Fill `folder` with `out` and the JSON of three commands; returns the files of these by name."""
    _output_folder(folder / "out")
    contents = {"compare": comparison(), "ablate": ablation(), "evaluate": evaluation()}
    for name, content in contents.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return {name: folder / f"{name}.json" for name in contents}


def _output_folder(folder: Path) -> None:
    """What a run leaves behind, as far as the report reads it."""
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    neurons = LAYERS * WIDTH
    maps = torch.randn(NETWORKS, neurons, generator=generator).pow(3)
    maps = (maps - maps.mean(1, keepdim=True)) / maps.std(1, correction=0, keepdim=True)
    courses = torch.randn(500, NETWORKS, generator=generator, dtype=torch.float64)
    courses[:, 1] += courses[:, 0]

    def words(network: int, place: int) -> str:
        return HOSTILE[(network + place) % len(HOSTILE)]

    parts = ("before", "token", "after")
    header = {
        "model": "/home/someone/models/made-up",
        "contexts": [
            [
                {part: words(n, i + place) for place, part in enumerate(parts)} | {"activity": 3.0}
                for i in range(5)
            ]
            for n in range(NETWORKS)
        ],
        "driving_tokens": [
            [{"token": words(n, i), "activity": 1.5, "count": 7} for i in range(6)]
            for n in range(NETWORKS)
        ],
        "recurrence": {
            key: [0.5 + n / 100 for n in range(NETWORKS)]
            for key in ("iou_halves", "iou_seeds", "correlation_seeds", "shared_seeds")
        },
    }
    FunctionalNetworks(
        maps=maps,
        widths=[WIDTH] * LAYERS,
        mean=torch.zeros(neurons),
        std=torch.ones(neurons),
        explained_variance=torch.linspace(0.1, 0.01, NETWORKS, dtype=torch.float64),
        engagement=torch.ones(NETWORKS, dtype=torch.float64),
        energy=torch.linspace(9, 1, NETWORKS, dtype=torch.float64),
        connectivity=connectivity(courses),
        header=header,
    ).save(folder / "networks.safetensors")
    order = list(range(NETWORKS))[::-1]
    result = {
        "model": "/home/someone/models/made-up",
        "criterion": "second-order",
        "parameters_before": 7_300_000,
        "parameters_after": 5_100_000,
        "bytes_before": 14_600_000,
        "bytes_after": 10_200_000,
        "perplexity_before": 16.62,
        "perplexity_after": 18.82,
        "neurons_kept": 192,
        "neurons_total": neurons,
        "widths": [40, 24, 32, 32, 48, 16],
        "width_rule": "networks",
        "layout_trials": {"uniform": 0.2, "search": 0.15},
        "search": {"predicted": 0.16, "share": 0.6, "curve": [[0.5, 0.3], [0.6, 0.16], [0.7, 0.1]]},
        "layers_left_out": [2],
        "kept_networks": order[:KEPT],
        "ranked_networks": order,
        "calibration_tokens": 131072,
        "held_out_tokens": 14000,
        "calibration_fingerprint": "f00d",
        "task": None,
        "warning": HOSTILE[0],
        "recovery": {
            "perplexity_cut": 21.5,
            "perplexity_recovered": 18.82,
            "gap_closed": 0.549,
            "passes": 1,
            "tokens": 4096,
        },
    }
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "recipe.yaml").write_text(
        "model: made-up\noutput: /home/someone/secret\nnetworks: 20\noverwrite: true\n"
    )


def comparison(fingerprint: str = "f00d") -> dict[str, Any]:
    criteria = ("second-order", "flap", "wanda", "membership", "magnitude", "random")
    budgets = [
        {
            "kept": share,
            "networks": None,
            "widths": [round(WIDTH * share)] * LAYERS,
            "perplexity": {
                name: 16.62 * (1 + i / 2) ** (4 * (1 - share)) for i, name in enumerate(criteria, 1)
            },
        }
        for share in (0.7, 0.5, 0.3)
    ]
    facts = {"calibration_fingerprint": fingerprint}
    return {"model": "made-up", "facts": facts, "dense": 16.62, "budgets": budgets}


def ablation() -> dict[str, Any]:
    texts = {"prose": 0.01, "code": -0.002, "arithmetic": 0.55}

    def entry(neurons: int, rise: float, **more: Any) -> dict[str, Any]:
        return {
            "neurons": neurons,
            "perplexity": 16.62 + rise,
            "rise": rise / 16.62,
            "rise_by_text": {name: scale * rise for name, scale in texts.items()},
            "tasks": {"sciq_val": {"acc": 0.25}},
            **more,
        }

    def band(mean: float) -> dict[str, Any]:
        rises = dict.fromkeys(texts, 0.001)
        tasks = {"sciq_val": {"acc": {"mean": 0.31, "std": 0.01}}}
        sizes = {"neurons": 90, "n": 20}
        return {**sizes, "mean": mean, "std": 0.05, "rise_by_text": rises, "tasks": tasks}

    return {
        "model": "made-up",
        "action": "mask",
        "factor": None,
        "z": 3.0,
        "rank": "energy",
        "tokens": dict.fromkeys(texts, 4096),
        "dense": 16.62,
        "dense_loss_by_text": dict.fromkeys(texts, 2.0),
        "dense_tasks": {"sciq_val": {"acc": 0.32}},
        "networks": [entry(90, 6 / (1 + n), id=n) for n in range(NETWORKS)],
        "strongest": 0,
        "ratio_to_random": 51.3,
        "random": band(16.7),
        "components": [entry(90, 2 / (1 + n)) for n in range(NETWORKS)],
        "growing": {
            name: [
                entry(
                    90 * n,
                    rise * n,
                    n=n,
                    random=band(16.62 + 0.2 * rise * n),
                    components=entry(90 * n, 1.2 * rise * n),
                )
                for n in (1, 2, 4, 8)
            ]
            for name, rise in (("mask", 3.0), ("retain", 400.0))
        },
    }


def evaluation() -> dict[str, Any]:
    def tasks(shift: float) -> dict[str, Any]:
        accuracy = {"value": 0.61 + shift, "stderr": 0.02, "higher_is_better": True}
        perplexity = {"value": 7.1 - shift, "stderr": None, "higher_is_better": False}
        return {"arc_easy_val": {"acc": accuracy}, "prose_text": {"word_perplexity": perplexity}}

    beside = {"model": "/home/someone/models/made-up", "tasks": tasks(0.02)}
    return {"model": "/home/someone/pruned", "tasks": tasks(0.0), "compare": beside}
