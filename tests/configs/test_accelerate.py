"""accelerate reads our launch configurations as they are meant, and the commands on the page with them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "accelerate"
MEANT = {  # how processes are started, nodes, processes of all nodes
    "one_gpu": (DistributedType.NO, 1, 1),
    "one_node": (DistributedType.MULTI_GPU, 1, 8),
    "several_nodes": (DistributedType.MULTI_GPU, 2, 16),
    "fsdp": (DistributedType.FSDP, 1, 8),
}
COMMANDS = [
    line.removeprefix("accelerate launch ")
    for line in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8").splitlines()
    if line.startswith("accelerate launch ")
]


def test_every_file_is_known_here() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == MEANT.keys()


@pytest.mark.parametrize("name", MEANT)
def test_a_file_is_read_as_it_is_meant(name: str) -> None:
    """Precision, accumulation and compilation are the run's own settings: these files leave them alone."""
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.distributed_type, config.num_machines, config.num_processes) == MEANT[name]
    assert config.mixed_precision == "no" and not config.use_cpu and not config.dynamo_config
    assert not (config.deepspeed_config or config.megatron_lm_config or config.fp8_config)
    assert config.fsdp_config == ({"fsdp_version": 2} if name == "fsdp" else {})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_pages_commands_are_understood(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each starts the training command, of as many processes as its file says."""
    monkeypatch.chdir(ROOT)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(shlex.split(command)))
    assert (ROOT / arguments.training_script).is_file()
    assert (ROOT / arguments.training_script_args[arguments.training_script_args.index("--config") + 1]).is_file()
    kind, nodes, processes = MEANT[Path(arguments.config_file).stem]
    assert (arguments.num_machines, arguments.num_processes) == (nodes, processes)
    assert (arguments.multi_gpu, arguments.use_fsdp) == (
        kind == DistributedType.MULTI_GPU,
        kind == DistributedType.FSDP,
    )


def test_the_headers_name_their_own_files() -> None:
    assert len(COMMANDS) == 4
    for path in FOLDER.iterdir():
        named = re.findall(r"--config_file (\S+)", path.read_text(encoding="utf-8"))
        assert named and {ROOT / name for name in named} == {path}
