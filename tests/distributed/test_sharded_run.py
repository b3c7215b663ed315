"""The training command with an encoder in shards: killed and started again, it ends where one rank that holds it whole
ends.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from retriever import launch
from retriever.config import BatchConfig, Config, ConfigError, ModelConfig, OptimConfig, RunConfig
from tests.starts import Ended, start
from tests.tiny import save_tiny_model
from tests.workplace import ROOT, assert_trained_alike, make_workplace, metrics

ASKED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
STEPS = 6


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A run's arguments: a tiny model without dropout, evaluated after its last step."""
    folder = make_workplace(tmp_path_factory.mktemp("sharded"))
    save_tiny_model(folder / "model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    changed = f"batch.queries=11 train.max_steps={STEPS} train.save_every=2 train.log_every=1 run.timeout_s=60"
    return ["--config", str(folder / "run.yaml"), *changed.split(), "train.eval_every=0", "run.trackers=[]"]


def _of_accelerate(name: str) -> dict[str, str]:
    """What `accelerate launch` tells the processes of one of our launch configurations, besides where they meet."""
    words = ["--config_file", str(ROOT / "configs" / "accelerate" / name), "--num_processes", "2", "train.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    told = prepare_multi_gpu_env(arguments)
    return {key: value for key, value in told.items() if key.startswith(("ACCELERATE_", "FSDP_"))}


def _signalled(settings: list[str], run: Path, number: signal.Signals, receivers: Sequence[int]) -> Ended:
    """How two ranks in shards end, some of which receive a signal once they have saved."""
    started = start(run.parent, [*settings, f"run.output_dir={run}"], ranks=2, environment=ASKED)
    started.until(lambda: any((run / "checkpoints").glob("step-*")))
    for receiver in receivers:
        os.kill(started.processes[receiver].pid or 0, number)
    return started.wait()


def test_killed_and_resumed_in_shards_it_ends_as_one_whole_rank_does(settings: list[str]) -> None:
    folder = Path(settings[1]).parent
    ended = _signalled(settings, folder / "sharded", signal.SIGKILL, (0, 1))
    assert ended.statuses == [-signal.SIGKILL] * 2, ended.said
    launched = [*settings, f"run.output_dir={folder / 'sharded'}"]
    again = start(folder, launched, ranks=2, environment=_of_accelerate("fsdp.yaml")).wait()
    assert again.finished and "in shards on 2 ranks" in again.said and "resuming at step" in again.said, again.said
    whole = start(folder, [*settings, f"run.output_dir={folder / 'whole'}"]).wait()
    assert whole.finished and "in shards" not in whole.said, whole.said

    logs = [metrics(folder / run) for run in ("sharded", "whole")]
    losses, evaluated = (
        [[line[key] for line in log if key in line] for log in logs] for key in ("train/loss", "eval/MRR@10")
    )
    assert len(losses[1]) == STEPS and losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert evaluated[0] == pytest.approx(evaluated[1], abs=0.02) and 0 < evaluated[1][0] < 1
    assert_trained_alike(folder / "sharded" / "export", folder / "whole" / "export", folder / "model")


def test_a_signal_at_the_second_rank_stops_and_saves_the_run(settings: list[str]) -> None:
    run = Path(settings[1]).parent / "stopped"
    ended = _signalled([*settings, "train.max_steps=5000"], run, signal.SIGTERM, (1,))
    assert ended.statuses == [143, 143], ended.said
    step = int(ended.said.split("SIGTERM: stopped after step ")[1].split(",")[0])
    assert (run / "checkpoints" / f"step-{step:08d}").exists()


@pytest.mark.parametrize(
    ("variables", "config", "message"),
    [
        ({"FSDP_VERSION": "1"}, Config(), "fsdp_version: expected 2; received 1"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, Config(), "fsdp_offload_params: expected false; received true"),
        ({"FSDP_RESHARD_AFTER_FORWARD": "FALSE"}, Config(), "fsdp_reshard_after_forward: expected true"),
        (
            {},
            Config(optim=OptimConfig(precision="fp16")),
            "optim.precision: expected bf16 or fp32 with FSDP; received 'fp16'",
        ),
        ({}, Config(optim=OptimConfig(name="adafactor")), "optim.name"),
        ({}, Config(model=ModelConfig(fused=True)), "model.fused"),
        ({}, Config(batch=BatchConfig(retain=4096)), "batch.retain: expected auto or false with FSDP; received 4096"),
        (
            {},
            Config(batch=BatchConfig(retain_products=True)),
            "batch.retain_products: expected auto or false with FSDP; received True",
        ),
        ({}, Config(run=RunConfig(verify=True)), "run.verify"),
        ({"ACCELERATE_USE_FSDP": "false", "ACCELERATE_USE_DEEPSPEED": "true"}, Config(), "DeepSpeed"),
    ],
)
def test_what_does_not_go_with_shards_is_refused_by_name(
    variables: dict[str, str], config: Config, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (ASKED | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        launch.join(config)
