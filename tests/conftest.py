"""Fixtures: real ranks, a tiny model and tokenizer, and rows of data. Nothing is mocked."""

import gc
import inspect
import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

os.environ["DS_ACCELERATOR"] = "cpu"  # several ranks on any machine, in fp32
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs the network, and none should wait for it
torch.set_num_threads(1)  # the tests' own process beside up to four ranks on two cores

TEXT = [
    "wake me up at nine am on friday",
    "play the new song by adele",
    "what is the weather in paris tomorrow",
    "weck mich am freitag um neun uhr",
    "spiel das neue lied von adele",
    "wie wird das wetter morgen in paris",
    "разбуди меня в пятницу в девять",
    "включи новую песню адель",
    "какая завтра погода в париже",
]

#: Test files by the time they take, most first.
_LONG = [
    f"test_{name}" for name in ("slurm", "real_data", "study", "train", "corruptions", "faults", "launchers", "loss")
]

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def pytest_configure(config: pytest.Config) -> None:
    """Nothing goes to the user's own cache: set before test modules copy the environment."""
    os.environ["MLALIGN_CACHE"] = tempfile.mkdtemp(prefix="mlalign-tests-")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes first, so that no worker comes to one when the other is done."""
    items.sort(key=lambda item: _LONG.index(item.path.stem) if item.path.stem in _LONG else len(_LONG))


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(os.environ["MLALIGN_CACHE"], ignore_errors=True)


#: What takes ranks seconds to import, and once imported can be shared by all.
_IMPORTED = ["deepspeed", *(f"mlalign.commands.{name}" for name in ("train", "probe", "merge"))]


class RankPool:
    """Processes that form one gloo process group and run functions together, many times over."""

    def __init__(self, size: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_IMPORTED)
        self._pipes, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, port, theirs), daemon=True)
            process.start()
            self._pipes.append(ours)
            self._processes.append(process)

    def run(self, function: Callable, *args: Any, timeout: float = 300) -> list[Any]:
        """`function(*args)` on all ranks at once; their results in rank order. Raises what any of them raised."""
        for pipe in self._pipes:
            pipe.send((function, args))
        results: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(results) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in results]
            ready = multiprocessing.connection.wait(waiting, max(0, end - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(len(self._pipes)) if rank not in results]
                raise self._fail(f"ranks {missing} did not answer within {timeout} s")
            for pipe in ready:
                rank = self._pipes.index(pipe)
                ok, results[rank] = pipe.recv()
                if not ok:  # at once: the others may wait for this one for ever
                    raise self._fail(f"rank {rank} failed:\n{results[rank]}")
        return [results[rank] for rank in range(len(self._pipes))]

    def _fail(self, message: str) -> AssertionError:
        self.close()
        return AssertionError(message)

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.kill()


def _serve(rank: int, size: int, port: str, pipe) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        LOCAL_WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=port,
    )
    from mlalign import distributed

    _mind_strides(torch.distributed, distributed)
    gc.freeze()  # what is imported is looked through no more
    distributed.init()
    while True:
        function, args = pipe.recv()
        try:
            pipe.send((True, function(*args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def _mind_strides(*modules: ModuleType) -> None:
    """Refuse what only gloo forgives: NCCL sends and writes memory as it lies, whatever strides a tensor has."""
    sending = {"all_reduce", "broadcast", "send", "recv", "all_gather_into_tensor", "reduce_scatter_tensor"}
    sending |= {"all_gather_single", "reduce_scatter_single"}
    for module in modules:
        for name, value in list(vars(module).items()):
            if getattr(value, "__name__", None) in sending and inspect.isfunction(value):
                setattr(module, name, _minding_strides(value))


def _minding_strides(collective: Callable) -> Callable:
    @wraps(collective)
    def checked(*args: Any, **kwargs: Any) -> Any:
        tensors = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
        assert all(each.is_contiguous() for each in tensors), f"{collective.__name__} of a tensor not in row order"
        return collective(*args, **kwargs)

    return checked


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n).run(function, *args)` runs a function of a test module on n real ranks."""
    pools: dict[int, RankPool] = {}

    def get(size: int) -> RankPool:
        if size not in pools or not pools[size].alive:
            pools[size] = RankPool(size)
        return pools[size]

    yield get
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with BOS, EOS, padding and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<s>", "</s>"]
    bpe.train_from_iterator(
        TEXT, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", padding_side="right"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer) -> Path:
    """A directory with a random Llama of 4 blocks and the tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.1,
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(settings).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def alone_in_the_world() -> dict[str, str]:
    """The environment for a process that belongs to no group, whatever this process has joined in earlier tests."""
    group = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "CROSS_RANK", "CROSS_SIZE", "LOCAL_SIZE")
    return {name: value for name, value in os.environ.items() if name not in group} | {"OMP_NUM_THREADS": "1"}


def train_with(values: dict[str, Any], backward: Callable) -> str:
    """`mlalign train` on this rank with another `_backward`, which is given the real one first. Returns how it ends."""
    from mlalign.commands import train
    from mlalign.config import Config
    from mlalign.errors import StoppedError, UserError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_backward", partial(backward, train._backward))
        try:
            train.train(Config.model_validate(values))
        except (StoppedError, UserError) as error:
            return str(error)
    return "done"


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> dict[str, Path]:
    """Small files: task rows with answers of very unequal length, and bitext with repeated sentences."""
    folder = tmp_path_factory.mktemp("rows")
    languages = ["en", "de", "ru"]
    task = [
        {"prompt": f"{TEXT[i % 9]} {i} =>", "completion": " time: nine am;" * (i % 5 * 2 + 1), "lang": languages[i % 3]}
        for i in range(48)
    ]
    bitext = [
        {
            "src": f"{TEXT[3 + i % 6]} {i // 2}",
            "tgt": f"{TEXT[i % 3]} {i // 4}",
            "src_lang": languages[1 + i % 2],
            "tgt_lang": "en",
        }
        for i in range(48)
    ]
    return {
        "task": write_jsonl(folder / "task.jsonl", task),
        "task_dev": write_jsonl(folder / "task_dev.jsonl", task[:7]),
        "bitext": write_jsonl(folder / "bitext.jsonl", bitext),
        "bitext_dev": write_jsonl(folder / "bitext_dev.jsonl", bitext[:9]),
    }


@pytest.fixture
def settings(tmp_path, tiny_model, rows) -> dict[str, Any]:
    """A small, valid config as nested dicts, for tests to change."""
    return {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(tiny_model)},
        "lora": {"dropout": 0.0},
        "task": {"train": str(rows["task"]), "batch_size": 8, "micro_batch_size": 2, "max_length": 200},
        "alignment": {"train": str(rows["bitext"]), "batch_size": 8, "micro_batch_size": 8},
        "optimizer": {"steps": 3, "lr": 1e-2, "schedule": "constant", "warmup_ratio": 0.0},
    }
