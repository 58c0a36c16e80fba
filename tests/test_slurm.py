"""The shipped sbatch files on a real Slurm of two nodes: train, probe and evaluate, stop, crash, and come back."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cluster import NODES, slurm
from conftest import write_jsonl
from omegaconf import OmegaConf

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
DATA = ROOT.parent / "shared" / "data"
SITE = """\
NODES=2
WARNING=${WARNING:-30}
DOCTOR=${DOCTOR:-no}
export DS_ACCELERATOR=cpu
"""


class Cluster:
    """Submits jobs as a user does, in a directory of its own."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.folder = folder
        (folder / "site.env").write_text(SITE)
        self.environment = environment | {
            "MLALIGN_SITE": str(folder / "site.env"),
            "PATH": f"{BIN}:{environment['PATH']}",
            "OMP_NUM_THREADS": "1",
        }

    def ask(self, *words: object, timeout: float = 60, **environment: str) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment | environment,
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def submit(self, *words: object, **settings: str) -> str:
        """The job's id. Settings are those of site.env."""
        said = self.ask(ROOT / "slurm" / "submit", *words, **settings)
        return re.search(r"Submitted batch job (\d+)", said)[1]

    def state(self, job: str) -> dict[str, str]:
        shown = self.ask("scontrol", "show", "job", "-o", job).split()
        return dict(word.split("=", 1) for word in shown if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Until the job is in one of the states (its end by default)."""
        states = states or ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            found = self.state(job)
            if found["JobState"] in states:
                return found
            time.sleep(0.5)
        raise AssertionError(f"job {job} is {found['JobState']}\n{self.log(job)}")

    def log(self, job: str) -> str:
        """Of the job's script and of its ranks."""
        paths = [*self.folder.glob(f"logs/*-{job}.log"), *sorted(self.folder.glob(f"logs/*-{job}/rank-*.log"))]
        return "\n".join(f"== {path.name}\n{path.read_text()}" for path in paths)

    def logs(self) -> str:
        """Of all jobs, where one is a task of an array."""
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("logs/**/*.log")))

    def until(self, job: str, happened: Callable[[], bool]) -> None:
        """Wait for something that the job does."""
        end = time.monotonic() + 240
        while time.monotonic() < end:
            if happened():
                return
            time.sleep(0.05)
        raise AssertionError(f"job {job} does not come to it\n{self.log(job)}")

    def until_step(self, job: str, run_dir: Path, step: int) -> None:
        """Until the run has logged a step."""
        metrics = run_dir / "metrics.jsonl"
        self.until(job, lambda: metrics.exists() and any(row["step"] >= step for row in steps(metrics)))


def steps(metrics: Path) -> list[dict]:
    """Rows of metrics.jsonl that are whole."""
    lines = metrics.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def losses(run_dir: Path) -> list[tuple]:
    """(step, name, value) of all losses and learning rates, in the order of the file."""
    names = ("loss", "train/lr", "norm", "accuracy")
    return [
        (row["step"], name, value)
        for row in steps(run_dir / "metrics.jsonl")
        for name, value in row.items()
        if name.endswith(names)
    ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield Cluster(environment, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def recipe(cluster, tiny_model, rows):
    """recipe(name, **changes): a config file and its run directory."""

    def write(name: str, **changes) -> tuple[Path, Path]:
        settings = {
            "run_dir": str(cluster.folder / "runs" / name),
            "model": {"path": str(tiny_model)},
            "lora": {"dropout": 0.1},
            "task": {"train": str(rows["task"]), "batch_size": 8, "micro_batch_size": 1, "max_length": 200},
            "alignment": {"train": str(rows["bitext"]), "batch_size": 8, "micro_batch_size": 2},
            "optimizer": {"steps": 6, "lr": 1e-3, "schedule": "cosine"},
            "deepspeed": "ds_configs/zero2.json",
            "checkpoint_every": 1000,
            "log_every": 1,
        }
        path = cluster.folder / f"{name}.yaml"
        OmegaConf.save(OmegaConf.merge(settings, changes), path)
        return path, Path(settings["run_dir"])

    return write


@pytest.fixture(scope="module")
def published(cluster) -> dict[str, dict]:
    """Sources of real rows as `mlalign prepare` makes them, where the data pack lies beside the project."""
    if not DATA.exists():
        return {}
    source, prepared = cluster.folder / "massive", cluster.folder / "prepared"
    source.mkdir()
    for split in ("train", "dev", "test"):
        (source / f"es-ES.{split}.jsonl").symlink_to(DATA / "massive" / f"es-ES.{split}.jsonl")
    cluster.ask("mlalign", "prepare", "massive", source, prepared, "--format", "plain", "--max-rows", 300)
    return {"task": {"train": f"{prepared}/train.*.jsonl"}, "alignment": {"train": f"{DATA}/tatoeba/spa-eng.jsonl"}}


def test_training_on_two_nodes_with_two_ranks_each(cluster, recipe, published):
    """By ZeRO-3; by ZeRO-2 on two nodes in what follows."""
    path, run_dir = recipe("zero3", deepspeed="ds_configs/zero3.json", optimizer={"steps": 3}, **published)
    job = cluster.submit("train.sbatch", path, DOCTOR="yes", TASKS_PER_NODE="2")
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    for said in ("the same on all 4 ranks", "training can start", "4 ranks, ZeRO-3"):
        assert said in cluster.log(job)
    assert [row["step"] for row in steps(run_dir / "metrics.jsonl")] == [1, 2, 3]
    assert (run_dir / "adapter/adapter_model.safetensors").exists()


@pytest.fixture(scope="module")
def undisturbed(cluster, recipe):
    """Losses, step by step, and weights of a run that nothing happened to."""
    path, run_dir = recipe("undisturbed", optimizer={"steps": 40})
    job = cluster.submit("train.sbatch", path)
    assert cluster.wait(job)["JobState"] == "COMPLETED", cluster.log(job)
    return losses(run_dir), (run_dir / "adapter/adapter_model.safetensors").read_bytes()


def test_where_requeueing_is_forbidden_the_next_job_of_a_chain_goes_on(cluster, recipe, undisturbed):
    path, run_dir = recipe("chain", optimizer={"steps": 40})
    job = cluster.submit("train.sbatch", path, REQUEUE="no")
    cluster.until_step(job, run_dir, 5)
    cluster.ask("scancel", "--batch", "--signal=USR1", job)
    found = cluster.wait(job)
    assert (found["JobState"], found["Requeue"]) == ("COMPLETED", "0"), cluster.log(job)
    assert "stopped by a signal, all is saved: the next job of the chain is submitted" in cluster.log(job)
    following = str(int(job) + 1)
    assert cluster.wait(following)["JobState"] == "COMPLETED", cluster.log(following)
    assert losses(run_dir) == undisturbed[0]
    assert (run_dir / "adapter/adapter_model.safetensors").read_bytes() == undisturbed[1]


@pytest.mark.parametrize("disturbance", ["warning", "requeue"])
def test_a_job_that_is_warned_or_requeued_comes_back_with_the_same_losses(cluster, recipe, undisturbed, disturbance):
    path, run_dir = recipe(disturbance, optimizer={"steps": 40})
    job = cluster.submit("train.sbatch", path)
    cluster.until_step(job, run_dir, 5)
    if disturbance == "warning":  # as before a time limit
        cluster.ask("scancel", "--batch", "--signal=USR1", job)
    else:  # as an administrator or a preemption does
        cluster.ask("scontrol", "requeue", job)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", "1"), cluster.log(job)
    assert losses(run_dir) == undisturbed[0]
    assert (run_dir / "adapter/adapter_model.safetensors").read_bytes() == undisturbed[1]
    if disturbance == "warning":
        assert "stopped by a signal, all is saved: requeued" in cluster.log(job)
    assert "attempt 2" in cluster.log(job)


def kill_a_rank(path: Path, rank: int) -> None:
    """SIGKILL, as the kernel does where memory runs out."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().split(b"\0")
            environment = (process / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_rank = str(path).encode() in words and b"mlalign" in words and words[0].endswith(b"python")
        if is_rank and f"SLURM_PROCID={rank}".encode() in environment and b"SLURM_STEP_ID=0" in environment:
            os.kill(int(process.name), signal.SIGKILL)
            return
    raise AssertionError(f"no rank {rank} of {path}")


def test_a_job_that_loses_ranks_comes_back_each_time_with_the_same_losses(cluster, recipe, undisturbed):
    """Any rank, at any moment after something was saved. KILLS=20 kills as often."""
    rng, kills = random.Random(0), int(os.environ.get("KILLS", "2"))
    path, run_dir = recipe("crash", optimizer={"steps": 40}, checkpoint_every=1)
    job = cluster.submit("train.sbatch", path)
    for attempt in range(kills):
        latest = run_dir / "checkpoints" / "latest"
        before = latest.read_text() if latest.exists() else None
        cluster.until(job, lambda: latest.exists() and latest.read_text() != before)  # noqa: B023
        time.sleep(rng.random() / 10)
        kill_a_rank(path, rank=rng.randrange(2))
        killed = time.monotonic()
        cluster.until(job, lambda: int(cluster.state(job)["Restarts"]) > attempt)  # noqa: B023
        assert time.monotonic() - killed < 60
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("COMPLETED", str(kills)), cluster.log(job)
    assert "saved last: " in cluster.log(job)
    assert losses(run_dir) == undisturbed[0]
    assert (run_dir / "adapter/adapter_model.safetensors").read_bytes() == undisturbed[1]


@pytest.fixture
def crashing(cluster, tmp_path) -> dict[str, str]:
    """An environment in which a job's process is killed at once, if it runs with seed=2."""
    (tmp_path / "python").write_text("#!/bin/bash\n[[ $* == *seed=2* ]] && kill -9 $$\nexit 0\n")
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "overrides.txt").write_text("seed=1\nseed=2\n")
    return {"PATH": f"{tmp_path}:{cluster.environment['PATH']}"}


def test_a_job_that_crashes_twice_at_one_place_is_not_started_again(cluster, recipe, crashing):
    path, _ = recipe("hopeless")
    job = cluster.submit("train.sbatch", path, "seed=2", **crashing)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "1"), cluster.log(job)
    assert "twice after the same save (nothing): not started again" in cluster.log(job)


def test_a_task_of_an_array_is_requeued_alone(cluster, recipe, crashing, tmp_path):
    """The last one too, whose number is the array's."""
    path, _ = recipe("requeued")
    job = cluster.submit("--array=1-2", "sweep.sbatch", tmp_path / "overrides.txt", path, **crashing)
    ends = [cluster.wait(f"{job}_{task}") for task in (1, 2)]
    assert [(end["JobState"], end["Restarts"]) for end in ends] == [("COMPLETED", "0"), ("FAILED", "1")], cluster.logs()


def test_a_task_of_an_array_is_chained_by_itself_and_not_for_ever(cluster, recipe, crashing, tmp_path):
    """Where requeueing is forbidden, a task that always crashes is two jobs, and the other is one."""
    path, _ = recipe("chained")
    words = ["--array=1-2", "-N", 1, "--job-name=chained", "sweep.sbatch", tmp_path / "overrides.txt", path]
    job = cluster.submit(*words, REQUEUE="no", **crashing)

    def ends() -> list[tuple[str, str]]:
        shown = cluster.ask("scontrol", "show", "job", "-o").splitlines()
        jobs = [dict(word.split("=", 1) for word in line.split() if "=" in word) for line in shown]
        return sorted((each["ArrayTaskId"], each["JobState"]) for each in jobs if each["JobName"] == "chained")

    wanted = [("1", "COMPLETED"), ("2", "COMPLETED"), ("2", "FAILED")]
    cluster.until(job, lambda: ends() == wanted)
    time.sleep(2)
    assert ends() == wanted, cluster.logs()
    logs = [path.read_text() for path in cluster.folder.glob("logs/chained-*.log")]
    assert sum("twice after the same save (nothing): not started again" in log for log in logs) == 1


@pytest.mark.parametrize(
    ("doctor", "sentence"),
    [
        ("yes", "training cannot start: data: nowhere.jsonl does not exist or is not a file: check the path"),
        ("no", "nowhere.jsonl does not exist"),
    ],
)
def test_a_mistake_is_said_and_not_repeated(cluster, recipe, doctor, sentence):
    path, _ = recipe("mistake", task={"train": "nowhere.jsonl"})
    job = cluster.submit("train.sbatch", path, DOCTOR=doctor)
    found = cluster.wait(job)
    assert (found["JobState"], found["Restarts"]) == ("FAILED", "0"), cluster.log(job)
    assert f"not started again, fix it first: {sentence}" in cluster.log(job)


def test_a_run_that_loses_a_node_goes_on_where_there_is_room(cluster, recipe, undisturbed):
    """With half the ranks, on the node that is left; the losses are those of other dropout from there on."""
    path, run_dir = recipe("down", optimizer={"steps": 40}, checkpoint_every=5)
    job = cluster.submit("train.sbatch", path)
    cluster.until_step(job, run_dir, 12)
    for state in ("DRAIN", "DOWN"):  # draining: or it comes back at once, for the test's slurmd is well
        cluster.ask("scontrol", "update", f"NodeName={NODES[1]}", f"State={state}", "Reason=test")
    try:
        assert cluster.wait(job, "PENDING")["Restarts"] == "1", cluster.log(job)
        cluster.ask("scancel", job)
        fewer = cluster.submit("--nodes=1", "train.sbatch", path)
        assert cluster.wait(fewer)["JobState"] == "COMPLETED", cluster.log(fewer)
        assert "saved by 2 ranks with ZeRO-2" in cluster.log(fewer), cluster.log(fewer)
    finally:
        cluster.ask("scontrol", "update", f"NodeName={NODES[1]}", "State=RESUME")
    found, wanted = ({row[:-1]: row[-1] for row in each} for each in (losses(run_dir), undisturbed[0]))
    assert found.keys() == wanted.keys()
    assert {key: found[key] for key in wanted if key[0] <= 12} == {key: wanted[key] for key in wanted if key[0] <= 12}
    assert found[40, "train/task_loss"] == pytest.approx(wanted[40, "train/task_loss"], rel=0.02)


def test_a_cancelled_job_stays_cancelled(cluster, recipe):
    path, run_dir = recipe("cancelled", optimizer={"steps": 2000})
    job = cluster.submit("train.sbatch", path)
    cluster.until_step(job, run_dir, 2)
    cluster.ask("scancel", job)
    assert cluster.wait(job)["JobState"] == "CANCELLED"
    time.sleep(3)
    assert cluster.state(job)["JobState"] == "CANCELLED", cluster.log(job)


# ------------------------------------------------------------------------------------ the other scripts, launch/srun.sh


def test_srun_gives_the_losses_of_torchrun(cluster, recipe):
    here, run_here = recipe("torchrun", optimizer={"steps": 3})
    there, run_there = recipe("srun", optimizer={"steps": 3})
    wrapped = f"--wrap=NPROC=2 {ROOT}/launch/srun.sh {there}"
    words = ["--nodes=1", "--ntasks=1", "--exclusive", "--output=srun.log"]  # NPROC counts, not --ntasks
    job = re.search(r"\d+", cluster.ask("sbatch", *words, wrapped))[0]
    cluster.ask(ROOT / "launch" / "torchrun.sh", here, NPROC="2", timeout=240)
    assert cluster.wait(job)["JobState"] == "COMPLETED", (cluster.folder / "srun.log").read_text()
    assert losses(run_here) == losses(run_there)


def test_a_sweep_with_staged_data_in_a_container(cluster, recipe, rows, tmp_path):
    """Two runs by two lines. The container is a stand-in that notes its arguments and runs the command outside."""
    image = tmp_path / "image.sif"
    stand_in = tmp_path / "bin" / "apptainer"
    stand_in.parent.mkdir()
    stand_in.write_text('#!/bin/bash\nwhile [ "$1" != IMAGE ]; do echo "$1"; shift; done > NOTE\nshift && exec "$@"\n')
    stand_in.write_text(stand_in.read_text().replace("IMAGE", str(image)).replace("NOTE", str(tmp_path / "note")))
    stand_in.chmod(0o755)
    data = rows["task"].parent
    path, _ = recipe("sweep", optimizer={"steps": 1}, task={"train": f"{data}/task.jsonl"})
    overrides = tmp_path / "overrides.txt"
    sources = f"task.train={data}/task.jsonl alignment.train={data}/bitext.jsonl"
    folders = [cluster.folder / "runs" / f"sweep{layer}" for layer in (1, 3)]
    lines = [f"alignment.layer={name} run_dir={folder} {sources}" for name, folder in zip((1, 3), folders)]
    overrides.write_text("\n".join(lines) + "\n")
    job = cluster.submit(
        "--array=1-2",
        "--nodes=1",
        "sweep.sbatch",
        overrides,
        path,
        STAGE_DIR=str(data),
        LOCAL_DIR=str(tmp_path / "local"),
        CONTAINER_RUNTIME="apptainer",
        CONTAINER=str(image),
        PATH=f"{stand_in.parent}:{cluster.environment['PATH']}",
    )
    for task in (1, 2):
        assert cluster.wait(f"{job}_{task}")["JobState"] == "COMPLETED", cluster.logs()
    resolved = [OmegaConf.load(folder / "config.yaml") for folder in folders]
    assert [each.alignment.layer for each in resolved] == [1, 3]
    staged = resolved[0].task.train[0].path
    assert staged.startswith(str(tmp_path / "local")) and staged.endswith("/task.jsonl")
    assert Path(staged).parent.name == Path(resolved[1].task.train[0].path).parent.name  # whatever the job's id
    assert [path.suffix for path in (tmp_path / "local").glob("mlalign-*/*")] == [".lock"]  # copies go with their jobs
    assert (tmp_path / "note").read_text().split()[:3] == ["exec", "--nv", "--bind"]


def staged(source: str, *words: str, **changes: str) -> subprocess.CompletedProcess:
    """What `stage` of job.sh makes of a command's words; nothing is copied."""
    script = f'source {ROOT}/slurm/job.sh; on_every_node() {{ :; }}; stage "$@"; printf "%s\\n" "${{STAGED[@]}}"'
    environment = {"STAGE_DIR": source, "LOCAL_DIR": "/l", "SLURM_JOB_ID": "1", "MLALIGN_SITE": "/none"}
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script, "job", *words],
        env=os.environ | environment | changes,
        capture_output=True,
        text=True,
    )


def test_only_paths_in_the_staged_directory_are_changed():
    words = [
        "task.train=/p/data/a.jsonl",
        "task.dev=[/p/data/b,/p/data2/b]",
        "/p/data",
        "run_dir=/p/data2/x",
        "/q/p/data/c",
    ]
    for source in ("/p/data", "/p/data/"):
        _, *found = staged(source, *words).stdout.splitlines()
        copy = found[2]
        assert re.fullmatch(r"/l/mlalign-.*/staged-\d+", copy)
        assert found == [f"task.train={copy}/a.jsonl", f"task.dev=[{copy}/b,/p/data2/b]", copy, *words[3:]]
    assert "=/l/a&b#c/mlalign-" in staged("/p/data", "x=/p/data/y", LOCAL_DIR="/l/a&b#c").stdout
    done = staged("/p.ata", "--test", "/p/data/*")
    assert done.stdout.splitlines()[1:] == ["--test", "/p/data/*"]


@pytest.mark.parametrize("words", [["run_dir='/p/data/runs'"], ["--output", "/p/data/out"], ["--output=/p/data"]])
def test_results_in_the_staged_directory_are_refused(words):
    done = staged("/p/data", "recipe.yaml", *words)
    assert done.returncode == 2
    assert "lies in STAGE_DIR, whose copy is taken away at the end" in done.stdout


def test_staged_copies_are_whole_shared_and_taken_away(cluster, tmp_path):
    """Whatever was killed before; and no copy changes under a job that reads it."""
    source, copy = tmp_path / "source", tmp_path / "copy"
    source.mkdir()
    (source / "rows").write_text("one")
    running = re.search(r"\d+", cluster.ask("sbatch", "--output=/dev/null", "--wrap=sleep 300"))[0]
    cluster.wait(running, "RUNNING")

    def stage(way: str, job: str) -> None:
        cluster.ask(ROOT / "slurm" / "stage", way, source, copy, job)

    copy.mkdir()
    (copy / "rows").write_text("o")  # of a copy that was cut short
    (tmp_path / "copy.users").mkdir()
    (tmp_path / "copy.users" / "99999").touch()  # and its job is gone
    stage("in", running)
    assert (copy / "rows").read_text() == "one"
    assert [path.name for path in (tmp_path / "copy.users").iterdir()] == [running]
    stage("in", "99998")
    (source / "rows").write_text("other")
    with pytest.raises(
        AssertionError, match=f"source has changed, and on .* job {running} still reads what was staged"
    ):
        stage("in", "99997")
    stage("out", "99998")
    assert (copy / "rows").read_text() == "one"
    stage("out", running)
    assert not copy.exists()
    stage("in", "99997")
    assert (copy / "rows").read_text() == "other"
    cluster.ask("scancel", running)


def test_probe_and_evaluate_as_jobs(cluster, tiny_model, rows, tmp_path):
    """One on all ranks, the other as an array over languages."""
    for language in ("en", "de"):
        lines = [f"sentence {number} in {language}" for number in range(8)]
        (tmp_path / f"{language}.txt").write_text("\n".join(lines) + "\n")
        answers = [{"prompt": line, "completion": "None", "lang": language, "id": line[9:11]} for line in lines]
        write_jsonl(tmp_path / f"test.{language}.jsonl", answers)
    (tmp_path / "flores").mkdir()
    for language in ("en", "de"):
        (tmp_path / f"{language}.txt").rename(tmp_path / "flores" / f"{language}.txt")
    probing = cluster.submit("probe.sbatch", tiny_model, "--data", tmp_path / "flores", "--output", tmp_path / "probe")
    words = [
        "--task",
        "items",
        "--test",
        f"{tmp_path}/test.*.jsonl",
        "--output",
        tmp_path / "out",
        "--max-new-tokens",
        4,
    ]
    flags = ["--array=0-2", "--nodes=1"]
    evaluating = cluster.submit(*flags, "evaluate.sbatch", tiny_model, *words)
    assert cluster.wait(probing)["JobState"] == "COMPLETED", cluster.log(probing)
    assert json.loads((tmp_path / "probe" / "probe.json").read_text())["recommendation"]
    for task in (0, 1, 2):
        assert cluster.wait(f"{evaluating}_{task}")["JobState"] == "COMPLETED", cluster.logs()
    assert "there are 2 files, this is no. 2" in cluster.logs()
    reports = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").glob("*/report.json"))]
    assert [list(report["scores"]["f1"]) for report in reports] == [["de"], ["en"]]
