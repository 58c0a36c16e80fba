"""`mlalign probe`: states against one sentence at a time, any number of ranks, ZeRO-3, resuming, what it says."""

import gc
import itertools
import json
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TEXT, alone_in_the_world
from omegaconf import OmegaConf
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mlalign import distributed, retrieval, states
from mlalign.commands.probe import Settings, probe
from mlalign.config import load
from mlalign.errors import UserError
from mlalign.probe_report import MEASURES, Curves, correlate, read_report, recommend, shared_languages
from mlalign.tracker import console

SENTENCES = {
    "deu": ["weck mich", "spiel ein lied bitte jetzt", "wetter", "paris", "freitag um neun uhr", "neun", "adele"],
    "eng": ["wake me", "play a song please now", "weather", "paris", "friday at nine am", "nine", "the adele"],
    "rus": ["разбуди меня", "включи песню", "погода", "париж", "в пятницу в девять", "девять", "адель"],
    "swh": ["niamshe", "cheza wimbo tafadhali sasa", "wetter", "paris", "ijumaa saa tatu", "tatu", "adele"],
}


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    for language, sentences in SENTENCES.items():
        (folder / f"{language}.txt").write_text("\n".join(sentences) + "\n")
    return folder


@pytest.fixture
def asked(tmp_path, tiny_model, data) -> Settings:
    return Settings(model=str(tiny_model), data=str(data), output=tmp_path / "out", batch_size=3, keep_states=True)


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, tiny_model) -> Path:
    """A LoRA adapter that does something."""
    torch.manual_seed(1)
    lm = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False),
    )
    path = tmp_path_factory.mktemp("adapter")
    lm.save_pretrained(path)
    return path


def saved_states(output: Path) -> dict[str, np.ndarray]:
    return {path.name.split("-")[0]: np.load(path) for path in sorted((output / "states").glob("*.npy"))}


@pytest.mark.parametrize("pool_bos", [True, False])
def test_states_equal_one_sentence_at_a_time(asked, tiny_model, tokenizer, pool_bos):
    probe(replace(asked, pooling=("mean", "last"), pool_bos=pool_bos))
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    blocks = []
    for block in lm.model.layers:
        block.register_forward_hook(lambda _block, _args, output: blocks.append(output))
    found = saved_states(asked.output)
    assert sorted(found) == sorted(SENTENCES)
    for language, sentences in SENTENCES.items():
        assert found[language].shape == (2, 5, len(sentences), 32)
        for number, text in enumerate(sentences):
            ids = torch.tensor([[1, *tokenizer.encode(text, add_special_tokens=False)]])
            blocks.clear()
            with torch.no_grad():
                lm(input_ids=ids)
            for layer, tokens in enumerate([lm.model.embed_tokens(ids), *blocks]):
                tokens = tokens[0] if tokens.dim() == 3 else tokens
                mean = tokens[0 if pool_bos else 1 :].mean(0)
                assert np.allclose(found[language][0, layer, number], mean.detach(), atol=1e-5)
                assert np.allclose(found[language][1, layer, number], tokens[-1].detach(), atol=1e-5)


def test_some_layers_are_those_of_all(asked):
    probe(asked)
    every = saved_states(asked.output)["rus"]
    for layers, index in (("1-2,4", [1, 2, 4]), ("0-1", [0, 1]), ("3", [3])):
        output = asked.output / layers
        result = probe(replace(asked, layers=layers, output=output))
        assert result["layers"] == index
        assert np.array_equal(saved_states(output)["rus"], every[:, index])


def test_the_result_is_made_of_the_measures(asked):
    result = probe(asked)
    layers = saved_states(asked.output)
    languages = list(SENTENCES)
    found = result["models"]["model"]["mean"]
    ids = torch.arange(7).expand(4, -1)
    for layer in range(5):
        rows = torch.stack([torch.from_numpy(layers[language][0, layer]) for language in languages])
        expected = retrieval.retrieval(rows, ids)
        expected |= {"cka": retrieval.linear_cka(rows), "anisotropy": retrieval.anisotropy(rows)}
        for measure, values in expected.items():
            assert np.allclose(found["directions"][measure][layer], values, atol=1e-6, equal_nan=True), measure
        separability = retrieval.separability(list(rows))
        assert np.allclose(found["by_language"]["separability"][layer], separability, atol=1e-6)
        ratio = np.array(found["directions"]["margin_ratio"][layer])
        others = [1, 2, 3]
        around_first = [*ratio[0, others], *ratio[others, 0]]
        assert found["by_language"]["margin_ratio"][layer][0] == pytest.approx(np.mean(around_first))
        assert found["mean"]["margin_ratio"][layer] == pytest.approx(np.mean(ratio[~np.eye(4, dtype=bool)]))
        assert found["groups"]["low-resource"]["margin_ratio"][layer] == found["by_language"]["margin_ratio"][layer][3]
    assert result["groups"]["Latin"] == ["deu", "eng", "swh"]
    on_disk = json.loads((asked.output / "probe.json").read_text())
    assert on_disk["models"]["model"]["mean"]["directions"]["cosine"][0][0][0] is None
    assert on_disk["recommendation"] == result["recommendation"]
    assert set(found["mean"]) == set(MEASURES)


def probe_on_ranks(settings: Settings) -> dict:
    torch.set_num_threads(1)
    return probe(settings)["models"]


@pytest.mark.parametrize("size, deepspeed", [(2, None), (2, "zero3.json"), (2, "zero3_offload.json"), (4, None)])
def test_ranks_and_zero_change_nothing(asked, adapter, ranks, size, deepspeed):
    asked = replace(asked, adapter=str(adapter), compare=asked.model, pooling=("mean", "last"))
    alone = probe(asked)["models"]
    file = deepspeed and f"ds_configs/{deepspeed}"
    together = ranks(size).run(probe_on_ranks, replace(asked, output=asked.output / "ranks", deepspeed=file))
    one, many = saved_states(asked.output), saved_states(asked.output / "ranks")
    assert one.keys() == many.keys()
    for language in one:
        assert np.allclose(one[language], many[language], atol=0 if deepspeed is None else 1e-5), language
    for models in together:
        for name in ("before", "after"):
            for measure in MEASURES:
                expected = np.array(alone[name]["mean"]["by_language"][measure])
                assert np.allclose(expected, models[name]["mean"]["by_language"][measure], atol=1e-5), measure
    assert not np.allclose(alone["before"]["mean"]["mean"]["cka"], alone["after"]["mean"]["mean"]["cka"], atol=1e-3)


def test_an_adapter_counts_as_if_it_were_merged(asked, adapter, tiny_model, tmp_path):
    result = probe(replace(asked, compare=str(adapter)))
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    from peft import PeftModel

    merged = tmp_path / "merged"
    PeftModel.from_pretrained(lm, adapter).merge_and_unload().save_pretrained(merged)
    for file in Path(tiny_model).glob("tokenizer*"):
        shutil.copy(file, merged)
    other = probe(replace(asked, compare=str(merged), output=tmp_path / "other"))
    assert result["models"]["after"]["mean"]["mean"] == other["models"]["after"]["mean"]["mean"]
    run = tmp_path / "run"
    shutil.copytree(adapter, run / "adapter")
    again = probe(replace(asked, compare=str(run), output=tmp_path / "again"))
    assert json.dumps(again["models"]) == json.dumps(result["models"])  # as text: NaN equals itself


def test_an_interrupted_probe_encodes_only_what_it_lacks(asked, monkeypatch):
    probe(asked)
    files = {path.name.split("-")[0]: path for path in (asked.output / "states").iterdir()}
    times = {language: path.stat().st_mtime_ns for language, path in files.items()}
    (asked.output / "probe.json").unlink()
    files["rus"].unlink()
    (asked.output / "states" / "rus-0.partial").write_bytes(b"half")
    with console.capture() as capture:
        probe(asked)
    assert "3 of 4 languages are encoded already" in capture.get()
    assert {x: path.stat().st_mtime_ns for x, path in files.items() if x != "rus"} == {
        x: when for x, when in times.items() if x != "rus"
    }
    (asked.output / "probe.json").unlink()
    monkeypatch.setattr(states, "_load", None)  # with nothing to encode, no model is loaded
    probe(asked)


def test_no_model_stays_when_its_states_are_written(asked, monkeypatch):
    """Two are compared one after the other: both at once may be more than a GPU holds."""
    seen = []

    class Seen(states.LayerStates):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            seen.append(weakref.ref(self.lm))

    monkeypatch.setattr(states, "LayerStates", Seen)
    gc.disable()
    try:
        probe(asked)
    finally:
        gc.enable()
    assert [model() for model in seen] == [None]


def test_a_finished_probe_is_shown_again_and_not_measured(asked, data, monkeypatch):
    asked = replace(asked, keep_states=False)
    first = probe(asked)
    assert not (asked.output / "states").exists()
    with monkeypatch.context() as patch:
        patch.setattr(states, "_load", None)
        again = probe(replace(asked, batch_size=7))
    assert np.allclose(
        np.array(again["models"]["model"]["mean"]["mean"]["cka"]), first["models"]["model"]["mean"]["mean"]["cka"]
    )
    (data / "eng.txt").write_text("\n".join(["another one", *SENTENCES["eng"][1:]]) + "\n")
    changed = probe(asked)
    assert changed["fingerprint"] != first["fingerprint"]
    assert probe(replace(asked, max_sentences=6))["fingerprint"] != changed["fingerprint"]
    assert probe(replace(asked, pool_bos=False))["fingerprint"] != changed["fingerprint"]


def test_states_of_older_weights_are_never_taken(asked, tiny_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    before = probe(replace(asked, model=str(model)))
    lm = AutoModelForCausalLM.from_pretrained(model)
    lm.model.layers[0].mlp.down_proj.weight.data *= 2
    lm.save_pretrained(model)
    assert probe(replace(asked, model=str(model)))["fingerprint"] != before["fingerprint"]


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_probe_goes_on(asked, data, killer):
    for number in range(12):  # enough to be killed in the midst of
        lines = [f"{TEXT[i % 9]} {number} {i}" for i in range(150)]
        (data / f"x{number:02}.txt").write_text("\n".join(lines) + "\n")
    for language in SENTENCES:
        (data / f"{language}.txt").unlink()
    command = [
        sys.executable,
        "-m",
        "mlalign",
        "probe",
        asked.model,
        "--data",
        str(data),
        "--output",
        str(asked.output),
    ]
    folder = asked.output / "states"
    job = asked.output.parent / "job"
    job.mkdir()
    environment = alone_in_the_world() | {"MLALIGN_JOB_DIR": str(job)}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    while len(list(folder.glob("*.npy"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(killer)
    assert process.wait(60) == (-killer if killer == signal.SIGKILL else 75)
    assert (job / "stopped").exists() == (killer != signal.SIGKILL)
    assert (job / "progress").read_text().strip().endswith(".npy")
    there = len(list(folder.glob("*.npy")))
    assert not (asked.output / "probe.json").exists()
    done = subprocess.run(command, capture_output=True, text=True, env=alone_in_the_world())
    assert done.returncode == 0, done.stderr
    assert f"{there} of 12 languages are encoded already" in done.stdout
    assert (asked.output / "probe.json").exists()
    assert not folder.exists()


def test_bitext_is_measured_against_its_pivot_only(asked, tmp_path):
    folder = tmp_path / "bitext"
    folder.mkdir()
    for language in ("deu", "rus"):
        rows = [
            {"src": src, "tgt": tgt, "src_lang": language, "tgt_lang": "eng"}
            for src, tgt in zip(SENTENCES[language], SENTENCES["eng"])
        ]
        (folder / f"{language}-eng.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = probe(replace(asked, data=str(folder)))
    both = probe(replace(asked, output=tmp_path / "both"))
    assert saved_states(asked.output)["eng"].shape[2] == 7
    at = {code: both["languages"].index(code) for code in both["languages"]}
    for measure in ("cosine", "margin_ratio", "mexa", "cka"):
        pairs = np.array(result["models"]["model"]["mean"]["directions"][measure])
        every = np.array(both["models"]["model"]["mean"]["directions"][measure])
        assert np.allclose(pairs[:, 0, 1], every[:, at["deu"], at["eng"]], atol=1e-5)
        assert np.allclose(pairs[:, 1, 2], every[:, at["eng"], at["rus"]], atol=1e-5)
        assert np.isnan(pairs[:, 0, 2]).all()
    assert result["tables"] == [
        {"languages": ["deu", "eng"], "sentences": 7},
        {"languages": ["eng", "rus"], "sentences": 7},
    ]


def test_pictures_and_tensorboard_hold_everything(asked, adapter, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    report = tmp_path / "scores" / "report.json"
    report.parent.mkdir()
    report.write_text(json.dumps({"f1": {"de": 0.5, "en-US": 0.9, "ru": 0.4, "sw-KE": 0.1}}))
    result = probe(replace(asked, compare=str(adapter), reports=(report.parent,)))
    for name in ("layers", "languages", "directions", "transfer"):
        assert (asked.output / f"{name}.png").stat().st_size > 5000
    for name in ("before", "after"):
        events = EventAccumulator(str(asked.output / "tensorboard" / name))
        events.Reload()
        for group in ("all", "low-resource", "Latin", "non-Latin", "high-resource"):
            for measure in MEASURES:
                points = {event.step: event.value for event in events.Scalars(f"{group}/{measure}")}
                means = result["models"][name]["mean"]["mean" if group == "all" else "groups"]
                expected = (means if group == "all" else means[group])[measure]
                assert points == pytest.approx(dict(enumerate(expected)), abs=1e-6)
    root = EventAccumulator(str(asked.output / "tensorboard"))
    root.Reload()
    assert set(root.Tags()["images"]) == {"layers", "languages", "directions", "transfer"}
    found = result["correlation"][str(report.parent)]
    assert found["metric"] == "f1"
    assert len(found["before"]["pearson"]) == len(found["after"]["spearman_p"]) == 5
    assert found["languages"] == [["deu", "de"], ["eng", "en-US"], ["rus", "ru"], ["swh", "sw-KE"]]


# ------------------------------------------------------------------------------------------------ what follows from it


def made_up(accuracy: list[float], languages: int = 4) -> Curves:
    """The same accuracy in all directions, by layer."""
    directions = {"margin_ratio": np.array(accuracy)[:, None, None] * np.ones((1, languages, languages))}
    return Curves(list("abcdefgh")[:languages], directions, np.full((len(accuracy), languages), 0.5))


def test_the_recommended_layer_is_the_lowest_of_the_best():
    def layer(accuracy: list[float], sentences: int = 1000, layers: list[int] | None = None) -> int:
        return recommend(made_up(accuracy), layers or list(range(len(accuracy))), 4, [sentences])["layer"]

    assert layer([0.9, 0.1, 0.5, 0.7, 0.2]) == 3  # layer 0 cannot be aligned
    assert layer([0.1, 0.1, 0.699, 0.7, 0.2]) == 2  # a standard error is sqrt(0.7 * 0.3 / 4000) = 0.007
    assert layer([0.1, 0.1, 0.69, 0.7, 0.2]) == 3
    assert layer([0.1, 0.1, 0.69, 0.7, 0.2], sentences=100) == 2
    assert layer([0.9, 0.001, 0.002, 0.001, 0.0024]) == 2  # chance 0.001, give or take 0.0015: half the depth
    assert layer([0.9, 0.001, 0.002, 0.001, 0.0045]) == 4
    assert layer([0.1, 0.7, 0.2], layers=[0, 2, 4]) == 2
    assert "better than chance" in recommend(made_up([0.0, 0.0, 0.0]), [0, 1, 2], 2, [1000])["reason"]


def test_correlation_equals_its_formulas_and_all_orders():
    generator = np.random.default_rng(0)
    accuracy = generator.random((3, 6))
    matrices = accuracy[:, :, None] + accuracy[:, None, :]
    curves = Curves(list("abcdef"), {"margin_ratio": matrices}, accuracy)
    scores = {code: float(value) for code, value in zip("abcdef", generator.random(6))}
    found = correlate(curves, scores)
    assert shared_languages(["deu_Latn", "zho_Hans", "xx"], {"zh-CN": 1, "de": 2, "fr": 3}) == [
        ("deu_Latn", "de"),
        ("zho_Hans", "zh-CN"),
    ]
    y = np.array(list(scores.values()))
    for layer in range(3):
        x = np.array([np.mean([matrices[layer, i, j] for j in range(6) if j != i]) for i in range(6)])

        def pearson(p, q):
            p, q = p - p.mean(), q - q.mean()
            return (p * q).sum() / np.sqrt((p * p).sum() * (q * q).sum())

        assert found["pearson"][layer] == pytest.approx(pearson(x, y))
        ranks = [np.array([sum(other < one for other in values) for one in values]) for values in (x, y)]
        assert found["spearman"][layer] == pytest.approx(pearson(*ranks))
        for name, p, q in (("pearson", x, y), ("spearman", *ranks)):
            orders = np.array([pearson(p, q[list(order)]) for order in itertools.permutations(range(6))])
            # Two-sided as scipy has it: twice the smaller tail.
            tails = [(orders >= pearson(p, q) - 1e-12).mean(), (orders <= pearson(p, q) + 1e-12).mean()]
            assert found[f"{name}_p"][layer] == pytest.approx(min(1, 2 * min(tails)))


def test_four_languages_in_the_same_order_are_no_proof():
    accuracy = np.array([[0.1, 0.2, 0.3, 0.4]])
    curves = Curves(list("abcd"), {"margin_ratio": accuracy[:, :, None] + accuracy[:, None, :]}, accuracy)
    found = correlate(curves, {"a": 1, "b": 2, "c": 3, "d": 4})
    assert found["spearman"][0] == pytest.approx(1)
    assert found["spearman_p"][0] == pytest.approx(2 / 24)
    assert np.isnan(correlate(curves, {"a": 1, "b": 1, "c": 1})["pearson"][0])


def test_a_run_takes_the_recommended_layer(tmp_path, settings, asked):
    result = probe(asked)
    settings["alignment"]["layer"] = f"probe:{asked.output}"
    OmegaConf.save(OmegaConf.create(settings), tmp_path / "c.yaml")
    assert load(tmp_path / "c.yaml").alignment.layer == result["recommendation"]["layer"]
    with pytest.raises(UserError, match=r"alignment.layer is .*nowhere/probe.json cannot be read as the result of"):
        load(tmp_path / "c.yaml", [f"alignment.layer=probe:{tmp_path}/nowhere"])


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"layers": "2-9"}, r"layers 2-9: 9 is out of range, the model has layers 0 to 4"),
        ({"layers": "two"}, r"layers 'two' must be numbers and ranges, such as 0-8,16"),
        ({"layers": "4-2"}, r"layers '4-2' must hold a layer that can be aligned"),
        ({"layers": "0"}, r"layers '0' must hold a layer that can be aligned, 1 or higher"),
        ({"pooling": ("mean", "mean")}, r"pooling mean,mean names one twice"),
        ({"metric": "f1"}, r"metric f1 belongs to a --report, and there is none"),
        ({"deepspeed": "ds_configs/zero2.json"}, r"zero2.json is not ZeRO stage 3, and others shard nothing"),
        ({"pooling": ("max",)}, r"pooling max is not one of mean, last"),
        ({"compare": "/nowhere"}, r"compare /nowhere is not a directory"),
        ({"compare": "."}, r"compare \. holds no adapter_config.json and no config.json"),
        ({"reports": (Path("nowhere"),)}, r"report nowhere/report.json cannot be read"),
        ({"deepspeed": "nowhere.json"}, r"deepspeed: nowhere.json does not exist"),
        ({"adapter": "/nowhere"}, r"adapter /nowhere is not a directory"),
        ({"data": "/nowhere"}, r"/nowhere does not exist"),
        ({"output": Path("/proc/probe")}, r"output /proc/probe cannot be written"),
    ],
)
def test_mistakes_are_one_sentence(asked, changes, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        probe(replace(asked, **changes))
    assert "\n" not in str(error.value)
    assert not (asked.output / "probe.json").exists()


def test_a_report_of_translation_is_read_by_its_languages(tmp_path):
    scores = {"en-de": 30.0, "de-en": 40.0, "fr-de": 20.0, "en-sw": 5.0}
    (tmp_path / "report.json").write_text(json.dumps({"task": "translation", "scores": {"bleu": scores}}))
    found = read_report(tmp_path, None)
    assert found == ("bleu", {"de": 30.0, "fr": 20.0, "sw": 5.0})


def test_reports_that_do_not_fit_are_said(asked, tmp_path):
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"f1": {"fr": 0.5, "it": 0.4, "de": 0.3}}))
    with pytest.raises(UserError, match=r"shares 1 languages with the probe, but a correlation needs 3"):
        probe(replace(asked, reports=(report,)))
    with pytest.raises(UserError, match=r"has no metric bleu, but f1"):
        probe(replace(asked, reports=(report,), metric="bleu"))
    report.write_text(json.dumps({"f1": {"deu": 0.5, "eng": float("nan"), "rus": 0.3}}))
    with pytest.raises(UserError, match=r"report.json: f1 of eng is nan, which is no number"):
        probe(replace(asked, reports=(report,)))
    assert not (asked.output / "states").exists()  # all of it was said before anything was encoded


def test_a_training_run_is_no_place_for_a_probe(asked, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"out is a run of `mlalign train`: choose a directory of its own"):
        probe(asked)


def test_a_disk_too_small_for_the_states_is_said_first(asked, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1000, 900, 100))
    with pytest.raises(UserError, match=r"needs 0\.0 GiB for states, and 0\.0 GiB are free: give fewer"):
        probe(asked)


def test_only_its_own_states_are_deleted(asked):
    probe(replace(asked, max_sentences=5))  # kept
    others = sorted((asked.output / "states").iterdir())
    probe(replace(asked, keep_states=False))
    assert sorted((asked.output / "states").iterdir()) == others


def test_one_process_probes_with_offloaded_zero3(asked, tmp_path):
    alone = probe(asked)
    command = [
        sys.executable,
        "-m",
        "mlalign",
        "probe",
        asked.model,
        "--data",
        asked.data,
        "--output",
        str(tmp_path / "z"),
    ]
    command += ["--deepspeed", "ds_configs/zero3_offload.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=alone_in_the_world())
    assert done.returncode == 0, done.stderr
    sharded = json.loads((tmp_path / "z" / "probe.json").read_text())
    for measure in MEASURES:
        one, other = (each["models"]["model"]["mean"]["mean"][measure] for each in (alone, sharded))
        assert one == pytest.approx(other, abs=1e-5)


def test_states_that_are_no_numbers_name_the_sentence_and_the_layer(asked, tiny_model, tokenizer, tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    token = tokenizer.encode("paris", add_special_tokens=False)[0]
    lm.model.embed_tokens.weight.data[token, 0] = torch.nan
    lm.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    with pytest.raises(UserError, match=r"deu\.txt:\d: the state of \S+ at layer 0 is not a number: try") as error:
        probe(replace(asked, model=str(tmp_path / "model")))
    line = int(str(error.value).split("deu.txt:")[1][0])
    assert token in tokenizer.encode(SENTENCES["deu"][line - 1])


def test_long_sentences_are_cut_at_the_models_positions_and_counted(asked, data):
    (data / "eng.txt").write_text("\n".join(["x " * 400, *SENTENCES["eng"][1:]]) + "\n")
    with console.capture() as capture:
        result = probe(asked)
    assert "1 cut at 256 tokens" in capture.get()
    assert result["models"]["model"]["mean"]["mean"]["cosine"]


def test_a_full_disk_is_one_sentence(asked):
    """RLIMIT_FSIZE fails a write as a full disk does, in the midst of a file."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, old[1]))
        with pytest.raises(UserError, match=r"deu-\w+\.npy \(0\.00 GiB of states\) cannot be written"):
            probe(asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((asked.output / "states").iterdir()) == []


def test_rank_0_gets_every_ranks_tensor(ranks):
    assert ranks(4).run(to_main) == [[0, 10, 20, 30], [], [], []]


def to_main() -> list[int]:
    return [int(part) for part in distributed.to_main(torch.tensor(10 * distributed.rank()))]
