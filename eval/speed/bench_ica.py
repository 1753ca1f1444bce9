"""Compare the speed of the ICA solver, and its distance from the exact answer, with other solvers in one run.

    python eval/speed/bench_ica.py                       # [4096 tokens, 11008 neurons], 128 components
    python eval/speed/bench_ica.py --small               # the same in a minute or two
    python eval/speed/bench_ica.py --real MODEL --text FILE ... [--tokens 8192 6144]

The first two compare with scikit-learn, picard and icalens (if installed) on planted maps and on the activations of a
Llama-shaped MLP with random weights. `--real` compares only with the exact decomposition, on the inputs of every
`mlp.down_proj` of a checkpoint.

The exact answer is a full float64 eigendecomposition, then FastICA in float64 to a change of 1e-9. All solvers get the
same standardised data and the same ICA start. Where the data do not determine a map (its kurtosis is that of noise, or
there is no gap after eigenvalue k), the exact solver itself finds another map from another start: `determined` counts
the maps that all starts share. Two starts often agree by chance, so `--starts` sets how many there are.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import runpy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import scipy.linalg
import torch
from sklearn.decomposition import FastICA
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from fbn_prune.networks import ica

AGREE = 0.99


@dataclass(frozen=True)
class Exact:
    """Maps [k, N] from each of several starts, the signed token basis [T, k], and the seconds spent."""

    maps: list[Tensor]
    basis: Tensor
    eigen_seconds: float
    ica_seconds: float
    converged: bool

    @property
    def determined(self) -> Tensor:
        """Which maps of the first start every other start finds again, bool [k]."""
        matched = [ica.matched_correlation(self.maps[0], other) for other in self.maps[1:]]
        return torch.stack(matched).amin(dim=0) >= AGREE

    @property
    def between_starts(self) -> dict[str, Any]:
        """Agreement over all pairs of starts, and the number of different sets of maps."""
        pairs = list(itertools.combinations(range(len(self.maps)), 2))
        matched = [ica.matched_correlation(self.maps[a], self.maps[b]) for a, b in pairs]
        first: list[int] = []  # the first start of each different set of maps
        for start in range(len(self.maps)):
            if not any(matched[pairs.index((f, start))].min() >= AGREE for f in first):
                first.append(start)
        every = torch.stack(matched)
        return {
            "starts": len(self.maps),
            "different_solutions": len(first),
            "min": float(every.min()),
            "median": float(every.median()),
            "share_agreeing": float((every >= AGREE).double().mean()),
            "worst_pair_agreeing": int((every >= AGREE).sum(dim=1).min()),
        }


def exact(z: Tensor, k: int, seeds: Sequence[int]) -> Exact:
    """Return the reference, from the smaller of the token and the neuron covariance, in float64."""
    clock = time.perf_counter()
    centred = z.double() - z.double().mean(dim=1, keepdim=True)
    wide = centred.shape[0] <= centred.shape[1]
    gram = centred @ centred.T if wide else centred.T @ centred
    _, vectors = scipy.linalg.eigh(
        gram.numpy(), subset_by_index=[len(gram) - k, len(gram) - 1], overwrite_a=True
    )
    side = torch.from_numpy(np.ascontiguousarray(vectors[:, ::-1]))
    other = centred.T @ side if wide else centred @ side
    other /= other.norm(dim=0)
    basis, white = (side, other) if wide else (other, side)
    signs = torch.where(basis[0] < 0, -1.0, 1.0).double()  # as scikit-learn and icalens fix them
    basis, white = basis * signs, white * signs * z.shape[1] ** 0.5
    eigen_seconds, clock = time.perf_counter() - clock, time.perf_counter()
    found = [
        ica.fastica(white, w_init=ica.seeded_start(basis, seed), tol=1e-9, max_iter=3000)
        for seed in seeds
    ]
    maps = [(white @ unmixing.W.T).T for unmixing in found]
    seconds = (time.perf_counter() - clock) / len(seeds)
    return Exact(maps, basis, eigen_seconds, seconds, all(u.converged for u in found))


def ours(tol: float) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return a solver that runs `spatial_ica`, which draws the same start from the seed, to a change of `tol`."""

    def run(z: Tensor, k: int, start: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        result = ica.spatial_ica(lambda: [z], k, seed=seed, tol=tol)
        return result.maps, {
            "converged": result.converged,
            "iterations": result.ica_iterations,
            "eigen_iterations": result.eigen_iterations,
            "eigen_residual": result.eigen_residual,
        }

    return run


def scikit_learn(solver: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Return a solver that runs FastICA with its default stopping rule: a change of 1e-4, at most 200 iterations."""

    def run(z: Tensor, k: int, start: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
        how = {"whiten": "unit-variance", "whiten_solver": solver, "w_init": start.numpy()}
        model = FastICA(k, fun="cube", **how)
        maps = torch.from_numpy(model.fit_transform(z.T.numpy()).T)
        return maps, {"iterations": model.n_iter_, "converged": model.n_iter_ < 200}

    return run


def picard_o(z: Tensor, k: int, start: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Run Picard-O with the cube contrast and its defaults; whiten here as picard does, to fix the signs."""
    import picard

    centred = (z - z.mean(dim=1, keepdim=True)).numpy()
    u, d, _ = scipy.linalg.svd(centred, full_matrices=False)
    white = ((u / d).T[:k] * np.sign(u[0, :k])[:, None]) @ centred * z.shape[1] ** 0.5
    w_init = torch.linalg.svd(start)
    how = {"whiten": False, "centering": False, "return_n_iter": True}
    rotation = (w_init.U @ w_init.Vh).numpy()
    _, _, sources, iterations = picard.picard(white, fun="cube", w_init=rotation, **how)
    return torch.from_numpy(sources), {"iterations": iterations, "converged": iterations < 499}


def icalens(z: Tensor, k: int, start: Tensor, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Run the private solver of icalens 0.4: float64 eigh, then always max_iter (200) iterations."""
    spec = importlib.util.find_spec("icalens")
    assert spec is not None and spec.submodule_search_locations  # noqa: PT018
    # The package itself pins another transformers; its solver needs only torch.
    solver = runpy.run_path(str(Path(spec.submodule_search_locations[0]) / "_fastica.py"))
    w_init = torch.linalg.svd(start)
    result = solver["fit_fastica"](
        z.T.contiguous(),
        n_components=k,
        fun="cube",
        row_normalize=False,
        initial_unmixing=(w_init.U @ w_init.Vh).float(),
        objective_every=200,
    )
    maps = result.components @ (z - z.mean(dim=1, keepdim=True))
    return maps, {"iterations": result.n_iter, "converged": None}


SOLVERS: dict[str, Callable[..., tuple[Tensor, dict[str, Any]]]] = {
    "fbn-prune at 1e-4": ours(1e-4),  # scikit-learn's stopping rule, for the comparison of times
    "fbn-prune": ours(1e-6),  # the default
    "scikit-learn": scikit_learn("svd"),
    "scikit-learn eigh": scikit_learn("eigh"),
    "picard": picard_o,
    "icalens": icalens,
}


def planted(tokens: int, neurons: int, k: int) -> Tensor:
    """Return Z [tokens, neurons] of k heavy-tailed maps of falling strength, with noise of equal strength."""
    g = torch.Generator().manual_seed(0)
    maps = torch.randn(k, neurons, generator=g) ** 3
    strengths = (1 + torch.arange(k)) ** -0.34
    signal = (torch.randn(tokens, k, generator=g) * strengths) @ maps
    noise = torch.randn(tokens, neurons, generator=g)
    return ica.standardise(signal + noise * signal.std())[0]


def llama(tokens: int, neurons: int, k: int) -> Tensor:
    """Return Z of one Llama layer with random weights, on random tokens of natural (Zipf) frequency."""
    torch.manual_seed(0)
    hidden = 4096 * neurons // 11008 // 128 * 128
    sizes = {"hidden_size": hidden, "intermediate_size": neurons, "vocab_size": 8192}
    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=hidden // 128, **sizes)
    model = LlamaModel(config).eval()
    g = torch.Generator().manual_seed(0)
    frequency = 1.0 / (1 + torch.arange(config.vocab_size))
    blocks = torch.multinomial(frequency, tokens, replacement=True, generator=g).view(-1, 256)
    return ica.standardise(down_inputs(model, blocks)[0])[0]


def down_inputs(model: nn.Module, blocks: Tensor) -> list[Tensor]:
    """Return the input of every `mlp.down_proj`, [tokens, neurons] each, over all blocks [n, context]."""
    rows: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, inputs, name=name: rows.setdefault(name, []).append(inputs[0].flatten(0, -2))
        )
        for name, module in model.named_modules()
        if name.endswith("mlp.down_proj")
    ]
    with torch.inference_mode():
        for batch in blocks.split(8):
            model(batch)
    for hook in hooks:
        hook.remove()
    return [torch.cat(parts).float() for parts in rows.values()]


def agreement(maps: Tensor, reference: Tensor) -> dict[str, float]:
    """Return three figures of the matched absolute correlations of two sets of maps."""
    matched = ica.matched_correlation(maps, reference)
    return {
        "min": float(matched.min()),
        "median": float(matched.median()),
        "share_agreeing": float((matched >= AGREE).double().mean()),
    }


def compare(z: Tensor, k: int, names: Sequence[str], seed: int, starts: int) -> dict[str, Any]:
    """Run the exact solver, then every other on the same data and start."""
    truth = exact(z, k, range(seed, seed + starts))
    determined = truth.determined
    start = ica.seeded_start(truth.basis, seed)
    rows: dict[str, Any] = {}
    found: dict[str, Tensor] = {}
    for name in names:
        if name in {"picard", "icalens"} and importlib.util.find_spec(name) is None:
            rows[name] = {"skipped": "not installed"}
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            clock, processor = time.perf_counter(), time.process_time()
            maps, facts = SOLVERS[name](z, k, start, seed)
            seconds, processor = time.perf_counter() - clock, time.process_time() - processor
        found[name] = maps
        to_exact = ica.matched_correlation(truth.maps[0], maps)
        rows[name] = {
            "seconds": round(seconds, 2),
            "processor_seconds": round(processor, 2),
            **facts,
            "to_exact": agreement(truth.maps[0], maps),
            "determined_agreeing": int((to_exact[determined] >= AGREE).sum()),
            "warnings": [f"{w.category.__name__}: {w.message}" for w in caught],
        }
        print(f"  {name}: {seconds:.1f} s, {processor:.1f} s of processor time", flush=True)
    for name, maps in found.items():
        if "scikit-learn" in found:
            ratio = rows["scikit-learn"]["seconds"] / rows[name]["seconds"]
            rows[name]["to_scikit_learn"] = agreement(found["scikit-learn"], maps)
            rows[name]["times_faster"] = round(ratio, 1)
    return {
        "shape": [*z.shape],
        "components": k,
        "exact": {
            "eigen_seconds": round(truth.eigen_seconds, 1),
            "ica_seconds": round(truth.ica_seconds, 1),
            "converged": truth.converged,
            "between_starts": truth.between_starts,
            "determined": int(determined.sum()),
        },
        "solvers": rows,
    }


def show(title: str, result: dict[str, Any]) -> None:
    """Print one comparison as a table."""
    truth, k = result["exact"], result["components"]
    print(
        f"\n{title}: {result['shape'][0]} tokens x {result['shape'][1]} neurons, {k} components; "
        f"exact: {truth['eigen_seconds'] + truth['ica_seconds']:.0f} s, "
        f"{truth['between_starts']['starts']} starts share {truth['determined']} of {k} maps"
    )
    print(
        f"{'solver':18} {'seconds':>8} {'faster':>7} {'iter':>5} {'conv':>5}   "
        f"{'to exact: min':>13} {'median':>7} {'>=.99':>6} {'determined':>10}   {'to sklearn: median':>18} {'>=.99':>6}"
    )
    for name, row in result["solvers"].items():
        if "skipped" in row:
            print(f"{name:18} {row['skipped']}")
            continue
        near, other = row["to_exact"], row.get("to_scikit_learn", {})
        print(
            f"{name:18} {row['seconds']:8.1f} {row.get('times_faster', float('nan')):7.1f} "
            f"{row['iterations']:5} {row['converged']!s:>5}   {near['min']:13.4f} {near['median']:7.4f} "
            f"{near['share_agreeing']:6.0%} {row['determined_agreeing']:6}/{truth['determined']:<3}   "
            f"{other.get('median', float('nan')):18.4f} {other.get('share_agreeing', float('nan')):6.0%}"
        )


def text_blocks(
    model: str, files: Sequence[Path], tokens: int, context: int, sample: int
) -> Tensor:
    """Return random blocks [tokens // context, context] of token ids, evenly over the files."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    g = torch.Generator().manual_seed(sample)
    wanted = tokens // context
    chosen = []
    for place, file in enumerate(files):
        ids = torch.tensor(tokenizer(file.read_text()[:2_000_000])["input_ids"])
        blocks = ids[: len(ids) // context * context].view(-1, context)
        share = wanted * (place + 1) // len(files) - wanted * place // len(files)
        chosen.append(blocks[torch.randperm(len(blocks), generator=g)[:share]])
    return torch.cat(chosen)


def real(args: argparse.Namespace) -> dict[str, Any]:
    """Compare fast with exact maps on a checkpoint's activations, for two seeds and two token samples."""
    model = AutoModelForCausalLM.from_pretrained(args.real, dtype=torch.float32).eval()
    rows = []
    for tokens in args.tokens:
        for sample in (0, 1):
            blocks = text_blocks(args.real, args.text, tokens, args.context, sample)
            layers = [ica.standardise(x)[0] for x in down_inputs(model, blocks)]
            stream = partial(iter, layers)
            truth = exact(torch.cat(layers, dim=1), args.networks, range(args.starts))
            for seed in (0, 1):
                clock = time.perf_counter()
                result = ica.spatial_ica(stream, args.networks, seed=seed)
                seconds = time.perf_counter() - clock
                row: dict[str, Any] = {
                    "tokens": blocks.numel(),
                    "sample": sample,
                    "seed": seed,
                    "to_exact": agreement(truth.maps[seed], result.maps),
                    "seconds": round(seconds, 2),
                    "exact_seconds": round(truth.eigen_seconds + truth.ica_seconds, 1),
                    "converged": result.converged,
                    "iterations": [result.eigen_iterations, result.ica_iterations],
                    "eigen_residual": result.eigen_residual,
                    "between_starts": truth.between_starts,
                    "determined": int(truth.determined.sum()),
                }
                near, starts = row["to_exact"], row["between_starts"]
                print(
                    f"{row['tokens']} tokens, sample {sample}, seed {seed}: to exact min {near['min']:.4f} "
                    f"median {near['median']:.6f} ({near['share_agreeing']:.0%} >= {AGREE}); "
                    f"{seconds:.1f} s, exact {row['exact_seconds']} s, converged {result.converged}; "
                    f"{starts['starts']} starts: {starts['different_solutions']} solutions, median "
                    f"{starts['median']:.4f} min {starts['min']:.4f}, worst pair shares "
                    f"{starts['worst_pair_agreeing']}, all share {row['determined']} of {args.networks}",
                    flush=True,
                )
                rows.append(row)
    return {"model": args.real, "networks": args.networks, "runs": rows}


def main() -> None:
    """Parse the command line, run, print, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--small", action="store_true", help="1280 tokens x 2752 neurons, 24 components"
    )
    parser.add_argument("--real", metavar="MODEL", help="check on this checkpoint's activations")
    parser.add_argument("--text", type=Path, nargs="+", default=[], metavar="FILE")
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 6144], help="for --real")
    parser.add_argument("--context", type=int, default=256, help="for --real")
    parser.add_argument("--networks", type=int, default=64, help="for --real")
    parser.add_argument(
        "--data", nargs="+", choices=["planted", "llama"], default=["planted", "llama"]
    )
    parser.add_argument("--solvers", nargs="+", choices=list(SOLVERS), default=list(SOLVERS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--starts", type=int, default=4, help="exact solutions to compare, at least 2"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("bench_ica.json"))
    args = parser.parse_args()
    if args.starts < 2:
        parser.error(
            f"--starts {args.starts}: at least 2 are needed to see which maps are determined"
        )
    torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"threads": args.threads, "torch": torch.__version__}
    if args.real:
        if not args.text:
            parser.error("--real needs --text FILE ...")
        report["real"] = real(args)
    else:
        tokens, neurons, k = (1280, 2752, 24) if args.small else (4096, 11008, 128)
        for name in args.data:
            print(f"{name}:", flush=True)
            z = {"planted": planted, "llama": llama}[name](tokens, neurons, k)
            report[name] = compare(z, k, args.solvers, args.seed, args.starts)
            show(name, report[name])
    args.output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
