"""Who am I? Every launcher's environment, real launchers with equal losses, and meetings that fail in one sentence."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import alone_in_the_world
from omegaconf import OmegaConf

from mlalign import distributed
from mlalign.errors import StoppedError, UserError
from mlalign.launchers import Place, discover, first_host, started_together, threads

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
TORCH = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "n1", "MASTER_PORT": "29500"}
STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[012-014,17],x1",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "1234567",
}


def test_a_rank_that_sees_one_gpu_has_deepspeed_use_it(monkeypatch):
    """As by srun --gpus-per-task=1: DeepSpeed takes LOCAL_RANK for the GPU's number."""
    place = Place("srun", rank=3, world_size=4, local_rank=1, address="n1", port="29500")
    monkeypatch.setattr(distributed.launchers, "discover", lambda: place)
    monkeypatch.setattr(distributed, "uses_cuda", lambda: True)
    monkeypatch.setattr(distributed, "_local_rank", 0)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: False)
    for name, value in {"device_count": 1, "set_device": None, "current_device": 0}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(distributed, "_join", lambda place: 1 / 0)  # no further
    monkeypatch.setattr(os, "environ", {})
    with pytest.raises(ZeroDivisionError):
        distributed.init()
    assert os.environ["LOCAL_RANK"] == "0"
    assert distributed.local_rank() == 1


def test_every_launcher_is_recognised():
    assert discover(TORCH) == Place("deepspeed", 3, 4, 1, "n1", 29500)
    assert discover(TORCH | {"TORCHELASTIC_RUN_ID": "x"}).launcher == "torchrun"
    assert discover(STEP) == Place("srun", 3, 4, 1, "gpu012", 24567)
    assert discover(STEP | {"MASTER_ADDR": "h", "MASTER_PORT": "5"}) == Place("srun", 3, 4, 1, "h", 5)
    alone = discover({})
    assert (alone.launcher, alone.rank, alone.world_size, alone.address) == ("none", 0, 1, "127.0.0.1")


def test_torchrun_inside_a_slurm_step_counts_and_a_batch_script_does_not():
    one_agent_per_node = STEP | {"SLURM_STEP_NUM_TASKS": "2"}
    assert discover(TORCH | one_agent_per_node).rank == 3
    batch = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_NTASKS": "4"}
    assert discover(batch).launcher == "none"
    assert [started_together(each) for each in ({}, batch, TORCH, STEP, {"OMPI_COMM_WORLD_SIZE": "3"})] == [
        1,
        1,
        4,
        4,
        3,
    ]
    assert discover({"OMPI_COMM_WORLD_SIZE": "1"}).launcher == "none"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu[012-014,17],x1", "gpu012"),
        ("127.0.1.[1-2]", "127.0.1.1"),
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("r[1-2]n[3,5-7]", "r1n3"),
        ("n[3,5]-ib", "n3-ib"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "RANK is set but WORLD_SIZE is not"),
        (TORCH | {"RANK": "4"}, "RANK is 4, but WORLD_SIZE is 4"),
        (TORCH | {"RANK": "one"}, "RANK is 'one', expected a number"),
        (TORCH | {"MASTER_PORT": ""}, "MASTER_PORT is '', expected a number"),
        ({**TORCH, **STEP, "RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1, but SLURM_STEP_NUM_TASKS says that 4"),
        (TORCH | {"OMPI_COMM_WORLD_SIZE": "8"}, "WORLD_SIZE is 4, but OMPI_COMM_WORLD_SIZE says that 8"),
        (
            {k: v for k, v in STEP.items() if k != "SLURM_STEP_NODELIST"},
            "SLURM_STEP_NODELIST and MASTER_ADDR are not set",
        ),
        (STEP | {"SLURM_JOB_ID": ""}, "SLURM_JOB_ID is '', expected a number"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes, but mpi4py sees 1"),
    ],
)
def test_what_contradicts_itself_is_refused(environment, message):
    if "mpi4py" in message:  # in a process of its own: this starts MPI
        code = f"from mlalign.launchers import discover; discover({environment})"
        done = subprocess.run(
            [sys.executable, "-c", code], env=alone_in_the_world(), capture_output=True, text=True, timeout=120
        )
        assert message in done.stderr
        return
    with pytest.raises(UserError, match=message):
        discover(environment)


# ------------------------------------------------------------------------------------------------------ real launchers


@pytest.fixture(scope="module")
def losses(tmp_path_factory, tiny_model, rows):
    """losses(launcher): of two ranks that a script in launch/ started, step by step; by hosts=2, one on each."""
    folder = tmp_path_factory.mktemp("launchers")

    def run(launcher: str, hosts: int = 1) -> list[dict]:
        run_dir = folder / f"{launcher}-{hosts}"
        settings = {
            "run_dir": str(run_dir),
            "model": {"path": str(tiny_model)},
            "lora": {"dropout": 0.1},
            "task": {"train": str(rows["task"]), "batch_size": 8, "micro_batch_size": 2, "max_length": 200},
            "alignment": {"train": str(rows["bitext"]), "batch_size": 8, "micro_batch_size": 4},
            "optimizer": {"steps": 3, "lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0},
            "deepspeed": "ds_configs/zero2.json",
            "log_every": 1,
        }
        recipe = folder / f"{launcher}.yaml"
        OmegaConf.save(OmegaConf.create(settings), recipe)
        environment = alone_in_the_world() | {"NPROC": str(2 // hosts), "PATH": f"{BIN}:{os.environ['PATH']}"}
        if hosts > 1:
            environment |= {"NNODES": str(hosts), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        command = [ROOT / "launch" / f"{launcher}.sh", recipe]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started = [subprocess.Popen(command, env=environment, **output) for _ in range(hosts)]
        said = "".join(process.communicate(timeout=300)[0] for process in started)
        assert [process.returncode for process in started] == [0] * hosts, said
        assert "2 ranks, ZeRO-2" in said
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        return [{name: value for name, value in line.items() if name.endswith(("loss", "norm"))} for line in lines]

    return run


def test_deepspeed_torchrun_and_mpirun_give_the_same_losses(losses):
    first = losses("deepspeed")
    assert len(first) == 3
    assert losses("torchrun") == first
    assert losses("torchrun", hosts=2) == first
    assert losses("mpirun") == first


# ------------------------------------------------------------------------------------------------- meetings that fail


def join(**environment: str) -> subprocess.CompletedProcess:
    """One process alone tries to join a group."""
    code = "from mlalign.distributed import init\nfrom mlalign.errors import UserError\ntry:\n  init()\n"
    code += "except UserError as e:\n  print(e)"
    names = {"RENDEZVOUS_TIMEOUT": "3", "MASTER_ADDR": "127.0.0.1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=alone_in_the_world() | names | environment,
        capture_output=True,
        text=True,
        timeout=90,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0", "MASTER_ADDR": "no-such-host.invalid"}, "MASTER_ADDR no-such-host.invalid is no host"),
        ({"RANK": "1"}, "no rank 0 at 127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT) within 3 s"),
        (
            {"RANK": "0"},
            "not all of 2 ranks (WORLD_SIZE) came to 127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT) within 3 s",
        ),
        ({"RANK": "0", "RENDEZVOUS_TIMEOUT": "soon"}, "RENDEZVOUS_TIMEOUT is 'soon', expected a number of seconds"),
    ],
)
def test_a_meeting_that_fails_is_one_sentence_in_time(environment, message):
    port = str(free_port())
    done = join(MASTER_PORT=port, **environment)
    said = done.stdout.strip().splitlines()[-1]
    assert message.format(port=port) in said
    assert said.startswith(f"rank {environment['RANK']} on host {socket.gethostname()}") or "RENDEZVOUS" in said


def test_deepspeed_takes_the_gpus_that_are_visible(tmp_path):
    """Beside a number of GPUs the launcher forgets CUDA_VISIBLE_DEVICES, and takes the first ones of the machine."""
    stand_in = tmp_path / "deepspeed"
    stand_in.write_text('#!/bin/sh\necho "$@"\n')
    stand_in.chmod(0o755)
    (tmp_path / "python").write_text("#!/bin/sh\necho 8\n")  # GPUs
    (tmp_path / "python").chmod(0o755)

    def launch(**environment: str) -> subprocess.CompletedProcess:
        ours = ("DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
        usual = {name: value for name, value in os.environ.items() if name not in ours}
        usual |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "MASTER_PORT": "1", "NPROC": "2"}
        script = Path(__file__).parent.parent / "launch" / "deepspeed.sh"
        return subprocess.run([script, "c.yaml"], env=usual | environment, capture_output=True, text=True)

    assert "--include localhost:2,3 --no_local_rank" in launch(CUDA_VISIBLE_DEVICES="2,3,5").stdout
    assert "--num_accelerators 2 --no_local_rank" in launch().stdout
    assert "--num_accelerators 2 --no_local_rank" in launch(CUDA_VISIBLE_DEVICES="0", DS_ACCELERATOR="cpu").stdout
    for visible in ("GPU-1a2b", "0"):
        refused = launch(CUDA_VISIBLE_DEVICES=visible)
        assert refused.returncode == 2
        assert f"CUDA_VISIBLE_DEVICES={visible} is no list of 2 numbers: use launch/torchrun.sh" in refused.stderr
    (tmp_path / "python").write_text(
        "#!/bin/sh\necho 0\n"
    )  # of a host that has no GPU, and in a container the variable
    assert "--num_accelerators 2 --no_local_rank" in launch(CUDA_VISIBLE_DEVICES="0").stdout


def test_a_job_that_is_stopped_while_it_loads_has_not_crashed(tmp_path, settings):
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    environment = alone_in_the_world() | {"MLALIGN_JOB_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "mlalign", "train", str(tmp_path / "c.yaml")]
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    listening = 1 << (signal.SIGTERM - 1)
    status = Path(f"/proc/{process.pid}/status")
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & listening:
        time.sleep(0.02)
    process.terminate()
    assert "stopped by a signal before it had begun" in process.communicate(timeout=120)[1]
    assert process.returncode == 75
    assert (tmp_path / "stopped").exists()


def test_a_port_that_is_taken_is_one_sentence():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        done = join(RANK="0", MASTER_PORT=str(port))
    assert f"the port of 127.0.0.1:{port} (MASTER_ADDR and MASTER_PORT) is taken" in done.stdout


LOSE_A_RANK = """
import os, sys
from pathlib import Path
import torch
from mlalign import checkpoint, distributed
distributed.init()
if distributed.rank() == 1:
    os._exit(1)
with checkpoint._said_in_one_sentence(Path(sys.argv[1])):
    distributed.all_sum(torch.ones(1))
"""


def test_a_rank_that_dies_while_a_checkpoint_is_saved_is_no_full_disk(tmp_path):
    """Or its job would not be started again."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "DS_ACCELERATOR": "cpu"}
    first, _ = [
        subprocess.Popen(
            [sys.executable, "-c", LOSE_A_RANK, str(tmp_path)],
            env=alone_in_the_world() | shared | {"RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    said = first.communicate(timeout=120)[1]
    assert "RuntimeError" in said and "UserError" not in said


def timeouts() -> list[float]:
    """Seconds that a collective may take, of torch's group of all, and of the one that ZeRO uses."""
    from deepspeed.utils import groups

    every = (torch.distributed.group.WORLD, groups._get_data_parallel_group())
    backends = [group._get_backend(torch.device("cpu")) for group in every]
    return [backend.options._timeout.total_seconds() for backend in backends]


def test_zeros_own_group_waits_as_long_as_all_others(ranks):
    """Else torch's 10 minutes with NCCL would end a run before the watchdog can say which rank holds it up."""
    assert ranks(2).run(timeouts) == [[7200, 7200]] * 2


@pytest.mark.parametrize(("given", "found"), [({}, None), ({"OMP_NUM_THREADS": "3"}, 3)])
def test_a_rank_has_its_share_of_the_cores(tmp_path, given, found):
    """DeepSpeed's CPU Adam is as fast as it has threads."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$OMP_NUM_THREADS"\n')
    (tmp_path / "torchrun").chmod(0o755)
    usual = {name: value for name, value in alone_in_the_world().items() if name != "OMP_NUM_THREADS"}
    usual |= {"PATH": f"{tmp_path}:{BIN}:{os.environ['PATH']}"}
    assert threads(1) <= len(os.sched_getaffinity(0))
    assert threads(1) // 2 <= threads(2) <= max(threads(1) // 2, 1)
    for nproc in (1, 2, 100_000):
        asked = subprocess.run(
            ["bash", ROOT / "launch/torchrun.sh", "c.yaml"],
            env=usual | given | {"NPROC": str(nproc)},
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(asked.stdout) == (found or (1 if nproc == 100_000 else threads(nproc)))


@pytest.mark.parametrize(
    ("leaving", "kept"), [(None, True), (StoppedError, True), (RuntimeError, False)], ids=["done", "stopped", "crashed"]
)
def test_a_job_that_has_crashed_is_not_taken_for_one_that_was_stopped(leaving, kept):
    """Its launcher sends the other ranks SIGTERM, which before the first step means that the job is to begin again."""
    usual = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, early := lambda *_: None)
    try:
        with suppress(StoppedError, RuntimeError), distributed.StopSignals():
            if leaving:
                raise leaving
        assert signal.getsignal(signal.SIGTERM) == (early if kept else signal.SIG_DFL)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGTERM, usual)
