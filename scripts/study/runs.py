"""The runs of a study: which come next, training, measuring."""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.evaluate import EvalOptions, evaluate_collection
from eval.several import name_of, read_collection
from retriever.callbacks import Callback
from retriever.config import Config
from retriever.config_file import load
from retriever.encoder.bundle import EncoderBundle, load_encoder
from retriever.environment import versions
from retriever.files import read_object
from retriever.report import commit
from retriever.run import Run
from retriever.step import StepReport
from scripts.study.config import ArmConfig, CollectionConfig, StudyConfig
from scripts.study.record import Record
from scripts.sweep import digest

_SETTLING_STEPS = 3  # not counted into the speed


class OutOfTime(Exception):  # noqa: N818
    """The next run would end too late."""


class Steps(Callback):
    """What a run's steps reported, and when they ended."""

    def __init__(self) -> None:
        self.reports, self.ends = list[StepReport](), list[float]()

    def on_train_begin(self, run: Any) -> None:
        """The clock of the training starts."""
        self.started = time.perf_counter()

    def on_step_end(self, run: Any, report: StepReport) -> None:
        """Keeps the report."""
        self.reports.append(report)
        self.ends.append(time.perf_counter())

    def facts(self, longest_gradient: float) -> dict[str, Any]:
        """Updates, real batch, share of clipped steps, loss, seconds and speed."""
        queries = [report.queries for report in self.reports]
        settled = range(min(_SETTLING_STEPS, len(queries) - 1), len(queries))
        times = np.diff([self.started, *self.ends])
        return {
            "updates": len(queries),
            "pairs": sum(queries),
            "batch": [min(queries), max(queries)],
            "clipped": statistics.fmean(report.grad_norm > longest_gradient for report in self.reports),
            "loss": statistics.fmean(report.loss for report in self.reports[-max(1, len(queries) // 10) :]),
            "train_s": round(self.ends[-1] - self.started, 3),
            "pairs_per_s": round(sum(queries[i] for i in settled) / sum(times[i] for i in settled)),
            "waited_share": round(sum(report.waited_s for report in self.reports) / (self.ends[-1] - self.started), 4),
        }


class Study:
    """Makes the runs of a configuration that its record lacks."""

    def __init__(self, config: StudyConfig, record: Record, seconds: float = math.inf) -> None:
        """`seconds`: no run is begun that would probably end later than this after now."""
        self._config, self._record = config, record
        self._end, self._longest = time.perf_counter() + seconds, 0.0

    def run(self) -> bool:
        """Whether all runs are made; False where the time was over before."""
        try:
            self._measure_start()
            for arm in self._config.arms:
                self._run_arm(arm)
        except OutOfTime as stop:
            print(f"stopped: {stop}", flush=True)
            return False
        return True

    def _run_arm(self, arm: ArmConfig) -> None:
        """Chooses the learning rates, then trains every value with one seed after the other."""
        config, tried = self._config, arm.values if arm.choose_at is None else arm.choose_at
        chosen = {config.x(arm, value): self._chosen_lr(arm, value) for value in tried}
        places, rates = np.log([*sorted(chosen)]), np.log([chosen[x] for x in sorted(chosen)])
        for seed in arm.seeds:
            for value in arm.values:
                x = config.x(arm, value)
                lr = chosen.get(x) or float(np.exp(np.interp(np.log(x), places, rates)))
                lr = float(f"{lr:.6g}")
                self._record.rates.setdefault(arm.name, {})[str(x)] = lr
                self._done(arm, value, lr, seed, tests=True)

    def _chosen_lr(self, arm: ArmConfig, value: int | None) -> float:
        first = self._config.first_lr(arm, value)
        tried = {factor: self._on_dev(arm, value, first * factor) for factor in sorted(arm.factors)}
        for _ in range(arm.extensions if len(tried) > 1 else 0):
            ordered, best = sorted(tried), max(tried, key=lambda factor: tried[factor])
            if best not in (ordered[0], ordered[-1]):
                break
            further = best * best / ordered[1 if best == ordered[0] else -2]
            tried[further] = self._on_dev(arm, value, first * further)
        best = max(tried, key=lambda factor: tried[factor])
        edge = " (at the edge of the grid)" if best in (min(tried), max(tried)) and len(tried) > 1 else ""
        found = ", ".join(f"{first * factor:.3g}: {tried[factor]:.4f}" for factor in sorted(tried))
        print(f"{arm.name} {arm.setting}={value}: lr {first * best:.3g}{edge}; dev by lr {found}", flush=True)
        return first * best

    def _on_dev(self, arm: ArmConfig, value: int | None, lr: float) -> float:
        done = self._done(arm, value, lr, 0, tests=False)
        return float(done["dev"]) if "dev" in done else -math.inf

    def _done(self, arm: ArmConfig, value: int | None, lr: float, seed: int, *, tests: bool) -> dict[str, Any]:
        """The run's record; trains it if there is none."""
        lr = float(f"{lr:.6g}")
        config = self._config.run(arm, value, lr, seed)
        key, of = digest(config), {"arm": arm.name, "x": self._config.x(arm, value), "lr": lr, "seed": seed}
        done = self._record.run(key)
        if done is None:
            left = self._end - time.perf_counter()
            if left < self._longest:
                raise OutOfTime(f"{left:.0f} s are left, and a run takes {self._longest:.0f} s")
            started = time.perf_counter()
            done = {"digest": key, **of, "setting": arm.setting, "overrides": [*arm.overrides]}
            done |= self._trained(config, tests)
            done["seconds"] = round(time.perf_counter() - started, 3)
            self._longest = max(self._longest, done["seconds"])
            self._record.runs.append(done)
        if arm.name not in (arms := done.setdefault("arms", [])):
            arms.append(arm.name)
        self._record.write()
        said = f"dev {done['dev']:.4f}" if "dev" in done else done["failed"]
        shown = {name: f"{np.mean(values):.4f}" for name, values in done.get("scores", {}).items()}
        print(f"run {of} {said} {shown} {done.get('pairs_per_s')} pairs/s {done['seconds']} s", flush=True)
        return done

    def _trained(self, config: Config, tests: bool) -> dict[str, Any]:
        folder, steps = Path(config.run.output_dir), Steps()
        shutil.rmtree(folder, ignore_errors=True)
        try:
            Run(config, callbacks=[steps]).train()
        except FloatingPointError as error:  # it diverged
            return {"failed": str(error)}
        return {**steps.facts(config.optim.max_grad_norm), **self._measured(config, folder / "export", tests)}

    def _measure_start(self) -> None:
        """The starting model's measures, as the run of digest `start`."""
        config = self._config.run(self._config.arms[0], self._config.arms[0].values[0], 1.0, 0)
        if self._record.run("start") is None:
            found = self._measured(config, Path(config.model.name_or_path), tests=True)
            self._record.runs.append({"digest": "start", "arm": "start", "seed": 0, "x": 0, **found})
            self._record.write()
            means = {name: f"{np.mean(values):.4f}" for name, values in found["scores"].items()}
            print(f"start: dev {found['dev']:.4f} {means}", flush=True)

    def _measured(self, config: Config, model: Path, tests: bool) -> dict[str, Any]:
        """The mean on dev and, with `tests`, each query's value on the others."""
        loaded = _Lengths(config, model)
        dev = float(np.mean(self._scores(loaded, self._config.dev)))
        asked = self._config.test if tests else ()
        found = {name_of(one): [round(x, 4) for x in self._scores(loaded, one)] for one in asked}
        return {"dev": dev, **({"scores": found} if tests else {})}

    def _scores(self, loaded: _Lengths, asked: CollectionConfig) -> Sequence[float]:
        collection, metric = read_collection(asked), self._config.metric
        shards = Path(self._config.output_dir) / "embeddings" / Path(asked.path).resolve().name
        result = evaluate_collection(loaded.at(asked), collection, [metric], shards, EvalOptions(k=100))
        assert result is not None  # one rank
        if (name := name_of(asked)) not in self._record.queries:
            ids = [*result.scores.query_ids]
            self._record.queries[name] = {"ids": ids, "clusters": _clusters(Path(asked.path), ids)}
        return [*map(float, result.scores.per_query[metric])]


class _Lengths:
    """A model, loaded once for each pair of lengths."""

    def __init__(self, config: Config, model: Path) -> None:
        self._config, self._model, self._loaded = config, model, dict[tuple[int, int], EncoderBundle]()

    def at(self, asked: CollectionConfig) -> EncoderBundle:
        """The model with a collection's lengths, or the run's."""
        model = self._config.model
        of_queries = asked.query_max_tokens or model.query_max_tokens
        of_passages = asked.passage_max_tokens or model.passage_max_tokens
        if (of_queries, of_passages) not in self._loaded:
            self._loaded[of_queries, of_passages] = load_encoder(
                self._model,
                precision=self._config.optim.precision,
                attention="auto",
                query_max_tokens=of_queries,
                passage_max_tokens=of_passages,
            )
        return self._loaded[of_queries, of_passages]


def environment(train: str) -> dict[str, Any]:
    """Device, versions, commit, and the hashes of the data that `scripts.make_pairs` wrote."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    found: dict[str, Any] = {"device": device, "commit": commit(), **versions(("torch", "triton", "transformers"))}
    for source in load(train, ["eval=null", "train.eval_every=0"]).data.train:
        manifest = read_object(Path(source.path or "") / "manifest.json")
        if manifest is not None:
            kept = ("content_sha256", "counts")
            found.setdefault("data", {})[str(source.path)] = {key: manifest.get(key) for key in kept}
    return found


def _clusters(folder: Path, ids: Sequence[str]) -> list[str]:
    """The module or package of each query where its metadata has one, else the query itself."""
    with (folder / "queries.jsonl").open(encoding="utf-8") as lines:
        records = map(json.loads, lines)
        modules = {record["_id"]: (record.get("metadata") or {}).get("module") for record in records}
    return [modules.get(id_) or id_ for id_ in ids]
