"""`mlalign evaluate`: real generation, on one rank and two, interrupted and repeated; and every bad input."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import TEXT, alone_in_the_world, write_jsonl
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from mlalign.commands.evaluate import Settings, evaluate
from mlalign.commands.train import train
from mlalign.config import load
from mlalign.errors import StoppedError, UserError
from mlalign.generation import end_ids
from mlalign.rundir import locked
from mlalign.tracker import console

PROMPTS = ["play", "what is the weather in paris tomorrow =>", "разбуди меня", "wake me up at nine", "a b", *TEXT]


@pytest.fixture(scope="module")
def test_file(tmp_path_factory) -> Path:
    rows = [
        {"prompt": prompt, "completion": " x; y", "lang": ["en", "de", "sw"][i % 3], "id": str(i)}
        for i, prompt in enumerate(PROMPTS)
    ]
    return write_jsonl(tmp_path_factory.mktemp("test") / "test.jsonl", rows)


@pytest.fixture
def settings(tmp_path, tiny_model, test_file) -> Settings:
    return Settings(
        output=tmp_path / "out",
        task="items",
        model=str(tiny_model),
        test=(str(test_file),),
        batch_size=4,
        max_new_tokens=6,
    )


def predictions(folder: Path) -> dict[str, str]:
    """id -> prediction."""
    lines = [line for path in sorted((folder / "predictions").iterdir()) for line in path.read_text().splitlines()]
    return {row["id"]: row["prediction"] for row in map(json.loads, lines)}


def saved_adapter(base: Path, folder: Path, seed: int = 0) -> Path:
    """A LoRA adapter that changes what the model says."""
    torch.manual_seed(seed)
    lm = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"])
    )
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    lm.save_pretrained(folder)
    return folder


# -------------------------------------------------------------------------------------------------------- generating


def greedy(lm, tokenizer, prompt: str, steps: int) -> str:
    ids = [1, *tokenizer.encode(prompt, add_special_tokens=False)]
    start = len(ids)
    while len(ids) < start + steps and ids[-1] != tokenizer.eos_token_id:
        ids.append(int(lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_batches_give_what_greedy_search_gives_one_by_one(settings, tiny_model, tokenizer):
    (report,) = evaluate(settings)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    wanted = {str(i): greedy(lm, tokenizer, prompt, 6) for i, prompt in enumerate(PROMPTS)}
    assert predictions(settings.output) == wanted
    assert report == json.loads((settings.output / "report.json").read_text())
    assert report["rows"] == {"de": 5, "en": 5, "sw": 4}
    assert report["groups"]["low-resource"]["languages"] == ["sw"]
    assert "| sw | 4 |" in (settings.output / "report.md").read_text()
    assert list((settings.output / "tensorboard").glob("events.*"))


def test_a_models_own_code_runs_where_it_is_asked_for(settings, tiny_model, tmp_path):
    path = tmp_path / "own"
    shutil.copytree(tiny_model, path)
    (path / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((path / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    (path / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": own}))
    with pytest.raises(UserError, match="brings Python code of its own: look at it, then set trust_remote_code"):
        evaluate(replace(settings, model=str(path)))
    (report,) = evaluate(replace(settings, model=str(path), trust_remote_code=True))
    (wanted,) = evaluate(replace(settings, output=tmp_path / "usual"))
    assert report["scores"] == wanted["scores"]
    assert predictions(settings.output) == predictions(tmp_path / "usual")


def test_beam_search_in_batches_is_beam_search_one_by_one(settings, tiny_model, tokenizer):
    evaluate(replace(settings, beams=3))
    lm = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[1, *tokenizer.encode(prompt, add_special_tokens=False)]])
        tokens = lm.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=3, max_new_tokens=6, do_sample=False
        )[0, ids.shape[1] :]
        assert predictions(settings.output)[str(i)] == tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_greedy_is_greedy_whatever_the_model_brings_along(settings, tiny_model, tmp_path):
    """Qwen2.5-Instruct ships a repetition penalty in its generation config, which `generate` would apply unasked."""
    evaluate(settings)
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    lm.generation_config.repetition_penalty = 5.0
    lm.generation_config.no_repeat_ngram_size = 1
    lm.save_pretrained(tmp_path / "biased")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "biased")
    evaluate(replace(settings, model=str(tmp_path / "biased"), output=tmp_path / "other"))
    assert predictions(tmp_path / "other") == predictions(settings.output)
    ids = AutoTokenizer.from_pretrained(tiny_model)(PROMPTS[3], return_tensors="pt")
    asked = AutoModelForCausalLM.from_pretrained(tmp_path / "biased").generate(**ids, max_new_tokens=6, do_sample=False)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).generate(**ids, max_new_tokens=6, do_sample=False)
    assert asked.tolist() != plain.tolist()  # else this test would say nothing
    adapter = saved_adapter(tiny_model, tmp_path / "adapter")
    for model in ("biased", tiny_model):
        evaluate(
            replace(
                settings,
                model=str(tmp_path / model),
                adapters=(str(adapter),),
                precision="bf16",  # where the adapter is not merged
                output=tmp_path / f"bf16_{Path(model).name}",
            )
        )
    assert predictions(tmp_path / "bf16_biased") == predictions(tmp_path / f"bf16_{tiny_model.name}")


def _evaluate_on_ranks(settings: Settings) -> list[dict]:
    return evaluate(settings)


def test_two_ranks_predict_and_report_the_same(settings, ranks, tmp_path):
    (alone,) = evaluate(settings)
    reports = ranks(2).run(_evaluate_on_ranks, replace(settings, output=tmp_path / "two"))
    assert reports == [[alone], [alone]]
    assert predictions(tmp_path / "two") == predictions(settings.output)


def test_an_answer_ends_where_the_template_ends_a_turn(tokenizer):
    assert end_ids(tokenizer, None) == [tokenizer.eos_token_id]
    import copy

    other = copy.deepcopy(tokenizer)
    other.add_special_tokens({"additional_special_tokens": ["<|eot|>"]})
    other.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|eot|>\n{% endfor %}"
    eot = other.convert_tokens_to_ids("<|eot|>")
    assert end_ids(other, [7, 8]) == sorted({other.eos_token_id, eot, 7, 8})


def test_a_tokenizer_without_padding_gives_the_same_answers(settings, tiny_model, tokenizer, tmp_path):
    evaluate(settings)
    folder = tmp_path / "unpadded"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model, pad_token=None).save_pretrained(folder)
    configuration = json.loads((folder / "tokenizer_config.json").read_text())
    configuration.pop("pad_token", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    assert AutoTokenizer.from_pretrained(folder).pad_token_id is None
    with console.capture() as capture:
        evaluate(replace(settings, model=str(folder), output=tmp_path / "other"))
    assert "has no padding token" in capture.get()
    assert predictions(tmp_path / "other") == predictions(settings.output)


# ---------------------------------------------------------------------------------------------------------- adapters


def test_several_adapters_each_get_a_report(settings, tiny_model, tokenizer, tmp_path):
    runs = [saved_adapter(tiny_model, tmp_path / name / "adapter", seed) for seed, name in enumerate(("one", "two"))]
    (runs[0] / "mlalign.json").write_text(json.dumps({"supervised": ["en"], "aligned": ["swh", "eng"]}))
    reports = evaluate(replace(settings, adapters=(str(tmp_path / "one"), str(runs[1]))))
    assert [report["adapter"] for report in reports] == [str(runs[0]), str(runs[1])]
    assert reports[0]["groups"]["supervised"]["languages"] == ["en"]
    assert reports[0]["groups"]["aligned"]["languages"] == ["sw"]
    assert reports[0]["groups"]["unseen"]["languages"] == ["de"]
    assert "supervised" not in reports[1]["groups"]
    found = [predictions(settings.output / name) for name in ("one", "two")]
    assert found[0] != found[1]
    from peft import PeftModel

    lm = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), runs[0]).eval()
    assert found[0]["3"] == greedy(lm, tokenizer, PROMPTS[3], 6)


def test_an_adapter_is_not_loaded_by_way_of_a_hosts_first_gpu(settings, tiny_model, tmp_path, monkeypatch):
    """Where peft is left to choose, it takes "cuda", which is cuda:0 on all ranks."""
    monkeypatch.setattr("peft.peft_model.infer_device", lambda: pytest.fail("peft was to choose a device"))
    evaluate(replace(settings, adapters=(str(saved_adapter(tiny_model, tmp_path / "adapter")),)))


def test_an_adapter_that_does_not_fit_is_one_sentence(settings, tiny_model, tmp_path):
    config = LlamaConfig.from_pretrained(tiny_model)
    for name, change in {"wide": {"hidden_size": 64, "head_dim": 16}, "deep": {"num_hidden_layers": 6}}.items():
        other = LlamaConfig(**(config.to_dict() | change))
        LlamaForCausalLM(other).save_pretrained(tmp_path / name)
        adapter = saved_adapter(tmp_path / name, tmp_path / f"{name}_adapter")
        with pytest.raises(UserError, match=rf"adapter .*{name}_adapter does not fit .*, it was trained on .*{name}"):
            evaluate(replace(settings, adapters=(str(adapter),), output=tmp_path / f"{name}_out"))
    with pytest.raises(UserError, match=r"adapter .*wide holds no adapter_config.json"):
        evaluate(replace(settings, adapters=(str(tmp_path / "wide"),)))
    for name in ("x", "y"):
        saved_adapter(tiny_model, tmp_path / name / "same")
    with pytest.raises(UserError, match=r"two adapters are called same"):
        evaluate(replace(settings, adapters=(str(tmp_path / "x/same"), str(tmp_path / "y/same"))))


def test_an_adapter_of_a_copy_of_the_model_is_used_and_said(settings, tiny_model, tmp_path):
    import shutil

    shutil.copytree(tiny_model, tmp_path / "copy")
    adapter = saved_adapter(tmp_path / "copy", tmp_path / "adapter")
    with console.capture() as capture:
        evaluate(replace(settings, adapters=(str(adapter),)))
    assert f"was trained on {tmp_path / 'copy'}; here it is put on {tiny_model}" in capture.get()


def test_a_run_tells_its_groups(settings, tmp_path, tiny_model, rows):
    recipe = tmp_path / "c.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {tiny_model}}}\nlora: {{r: 2}}\n"
        f"task: {{train: {rows['task']}, batch_size: 4, micro_batch_size: 4, max_length: 200}}\n"
        f"alignment: {{train: {rows['bitext']}, batch_size: 4, micro_batch_size: 4}}\n"
        "optimizer: {steps: 1}\n"
    )
    train(load(recipe))
    known = json.loads((tmp_path / "run/adapter/mlalign.json").read_text())
    assert known == {"step": 1, "supervised": ["de", "en", "ru"], "aligned": ["de", "en", "ru"]}
    (report,) = evaluate(replace(settings, adapters=(str(tmp_path / "run"),)))
    assert report["groups"]["supervised"]["languages"] == ["de", "en"]
    assert report["groups"]["unseen"]["languages"] == ["sw"]
    (report,) = evaluate(replace(settings, supervised=["sw"], score_only=True, model=None, test=()))
    assert report["groups"]["supervised"]["languages"] == ["sw"]


# ---------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGUSR1])
def test_killed_half_way_and_repeated_gives_the_same_report(settings, tmp_path, tiny_model, test_file, killer):
    (whole,) = evaluate(settings)
    output, job = tmp_path / "killed", tmp_path / "job"
    job.mkdir()
    command = [sys.executable, "-m", "mlalign", "evaluate", str(tiny_model), "--test", str(test_file)]
    command += ["--output", str(output), "--task", "items", "--batch-size", "4", "--max-new-tokens", "6"]
    environment = alone_in_the_world() | {"MLALIGN_JOB_DIR": str(job)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    first = output / "predictions" / "de.jsonl"
    end = time.monotonic() + 120
    while not first.exists() and time.monotonic() < end:
        time.sleep(0.001)
    process.send_signal(killer)
    _, said = process.communicate(timeout=60)
    assert first.exists()
    if not (output / "report.json").exists():  # the signal may have come late
        assert process.returncode == (-killer if killer == signal.SIGKILL else 75)
        assert (job / "stopped").exists() == (killer != signal.SIGKILL)
        assert ("the same command resumes" in said) == (killer != signal.SIGKILL)
    for later in ("en", "sw"):
        (output / "predictions" / f"{later}.jsonl").unlink(missing_ok=True)
    (output / "report.json").unlink(missing_ok=True)
    before = first.stat().st_mtime_ns
    with console.capture() as capture:
        (report,) = evaluate(replace(settings, output=output))
    assert "1 of 3 languages are in" in capture.get()
    assert first.stat().st_mtime_ns == before
    assert report == whole
    assert predictions(output) == predictions(settings.output)


def test_a_signal_stops_between_batches(settings, tmp_path):
    """Noticed before the next batch, on every rank; nothing half-done is kept."""

    def stop_at_second(calls=[]):  # noqa: B006 (counts its calls)
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    generated = []
    original = LlamaForCausalLM.generate

    def generate(self, *args, **kwargs):
        stop_at_second()
        generated.append(1)
        return original(self, *args, **kwargs)

    LlamaForCausalLM.generate = generate
    try:
        with pytest.raises(StoppedError):
            evaluate(replace(settings, batch_size=1))
    finally:
        LlamaForCausalLM.generate = original
    assert len(generated) == 2
    assert not list((settings.output / "predictions").glob("*.jsonl*"))
    evaluate(replace(settings, batch_size=1))


def test_predictions_of_other_settings_or_rows_are_never_mixed(settings, tmp_path, tiny_model):
    evaluate(settings)
    with pytest.raises(UserError, match=r"predictions of another evaluation \(different: beams\)"):
        evaluate(replace(settings, beams=2))
    changed = write_jsonl(tmp_path / "changed.jsonl", [{"prompt": "a", "completion": " b", "lang": "de"}])
    with pytest.raises(UserError, match=r"different: test rows of de, no test rows of en, no test rows of sw\)"):
        evaluate(replace(settings, test=(str(changed),)))
    evaluate(replace(settings, batch_size=2))  # the same answers, so the same evaluation
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"is a run of `mlalign train`"):
        evaluate(replace(settings, output=run))


def test_two_evaluations_at_once_do_not_mix(settings):
    with locked(settings.output, "output"):
        for asked in (settings, replace(settings, model=None, test=(), score_only=True)):
            settings.output.joinpath("evaluation.json").touch()
            with pytest.raises(UserError, match=rf"output {settings.output} is in use by process {os.getpid()} on"):
                evaluate(asked)
    settings.output.joinpath("evaluation.json").unlink()
    evaluate(settings)


def test_score_only_needs_no_model_and_gives_the_same_report(settings):
    (whole,) = evaluate(settings)
    path = settings.output / "report.json"
    path.unlink()
    assert evaluate(Settings(output=settings.output, task="items", score_only=True)) == [whole]
    assert json.loads(path.read_text()) == whole


def test_answers_of_another_system_are_scored(tmp_path):
    """The least that --score-only needs, as the docs have it."""
    folder = tmp_path / "other"
    (folder / "predictions").mkdir(parents=True)
    write_jsonl(folder / "predictions/de.jsonl", [{"prediction": "a; b", "gold": {"answer": "a"}}])
    (folder / "evaluation.json").write_text('{"task": "items", "rows": {"de": 1}}')
    (report,) = evaluate(Settings(output=folder, task="items", score_only=True))
    assert report["scores"]["f1"] == {"de": pytest.approx(2 / 3, abs=1e-6)}
    write_jsonl(folder / "predictions/de.jsonl", [{"prediction": "a; b", "gold": {"text": "a"}}])
    with pytest.raises(UserError, match=r"de.jsonl: a 'gold' is not of task items: 'answer'"):
        evaluate(Settings(output=folder, task="items", score_only=True))
    with pytest.raises(UserError, match=r"max_rows is not used with --score-only"):
        evaluate(Settings(output=folder, task="items", score_only=True, max_rows=3))


def test_a_file_that_is_named_twice_counts_once(settings, test_file):
    (report,) = evaluate(replace(settings, test=(str(test_file), str(test_file.parent / "*.jsonl"))))
    assert report["rows"] == {"de": 5, "en": 5, "sw": 4}
    with pytest.raises(UserError, match=r"test some/dataset is no local file"):
        evaluate(replace(settings, test=("some/dataset",)))


def test_merging_or_exporting_again_keeps_predictions(settings, tiny_model, tmp_path):
    asked = replace(settings, adapters=(str(saved_adapter(tiny_model, tmp_path / "adapter")),))
    evaluate(asked)
    saved_adapter(tiny_model, tmp_path / "adapter")  # the same bytes, written later
    evaluate(asked)
    saved_adapter(tiny_model, tmp_path / "adapter", seed=1)
    with pytest.raises(UserError, match=r"different: weights"):
        evaluate(asked)


def test_damaged_predictions_are_one_sentence(settings, tmp_path):
    again = Settings(output=settings.output, task="items", score_only=True)
    with pytest.raises(UserError, match=r"out holds no evaluation.json"):
        evaluate(again)
    evaluate(settings)
    with pytest.raises(UserError, match=r"holds predictions for task items, not slot_filling"):
        evaluate(replace(again, task="slot_filling"))
    path = settings.output / "predictions" / "en.jsonl"
    text = path.read_text()
    path.write_text("".join(text.splitlines(keepends=True)[:3]))
    with pytest.raises(UserError, match=r"en.jsonl holds 3 of 5 predictions: delete it and repeat"):
        evaluate(again)
    path.write_text(text[:-20])
    with pytest.raises(UserError, match=r"en.jsonl:5: not valid JSON"):
        evaluate(again)
    path.write_text(text.replace('"prediction"', '"answer"'))
    with pytest.raises(UserError, match=r"en.jsonl:1: expected text in 'prediction'"):
        evaluate(again)
    path.unlink()
    with pytest.raises(UserError, match=r"en.jsonl is missing"):
        evaluate(again)


# --------------------------------------------------------------------------------------------------------- bad input


def test_bad_test_rows_are_one_sentence(settings, tmp_path):
    good = {"prompt": "a", "completion": " b", "lang": "en"}

    def run(row: dict, **changes):
        path = write_jsonl(tmp_path / "bad.jsonl", [good, row])
        evaluate(replace(settings, test=(str(path),), **changes))

    with pytest.raises(UserError, match=r"bad.jsonl:2: no text in field 'lang'"):
        run({"prompt": "a", "completion": " b"})
    with pytest.raises(UserError, match=r"bad.jsonl:2: lang is 'klingonisch'"):
        run(good | {"lang": "klingonisch"})
    with pytest.raises(UserError, match=r"bad.jsonl:2: no field 'completion'"):
        run({"prompt": "a", "lang": "en"})
    with pytest.raises(UserError, match=r"bad.jsonl:2: .*no assistant turn|by 'user'"):
        run({"messages": [{"role": "user", "content": "a"}], "lang": "en"})
    with pytest.raises(UserError, match=r"bad.jsonl:1: no text in field 'annot_utt'"):
        run(good, task="slot_filling")
    with pytest.raises(UserError, match=r"bad.jsonl:2: the prompt has \d+ tokens, and with max_new_tokens 6 .* 256"):
        run(good | {"prompt": "so long " * 200})
    with pytest.raises(UserError, match=r"task poetry is not one of slot_filling"):
        run(good, task="poetry")
    with pytest.raises(UserError, match=r"evaluate needs a MODEL and --test files"):
        evaluate(replace(settings, model=None))
    with pytest.raises(UserError, match=r"backend vllm needs vLLM, which is not installed"):
        run(good, backend="vllm")
    assert not list(tmp_path.glob("out/predictions/*"))


def test_an_empty_answer_is_counted_and_scored(settings, tmp_path, tiny_model):
    """A model that ends at once: no crash, no division by nothing."""
    lm = AutoModelForCausalLM.from_pretrained(tiny_model)
    lm.lm_head.weight.data.zero_()
    lm.save_pretrained(tmp_path / "mute")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "mute")
    lm.generation_config.eos_token_id = [0, 2]  # all logits are equal, so the first token is 0
    lm.generation_config.save_pretrained(tmp_path / "mute")
    rows = [{"prompt": "a", "completion": " b", "lang": "en-de", "src": "a", "tgt_lang": "de"}] * 3
    path = write_jsonl(tmp_path / "mt.jsonl", rows)
    (report,) = evaluate(replace(settings, model=str(tmp_path / "mute"), test=(str(path),), task="translation"))
    assert report["empty"] == {"en-de": 3}
    assert report["scores"]["bleu"] == {"en-de": 0}
    assert report["scores"]["off_target"] == {"en-de": 1}


# ------------------------------------------------------------------------------------------------------------- COMET

COMMAND = """\
#!{python}
# Speaks as comet-score 2.2 does; the score is the number of letters that a translation shares with its reference.
import json, sys
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
lines = [open(words[name], encoding="utf-8").read().splitlines() for name in ("-s", "-t", "-r")]
rows = [dict(src=s, mt=t, ref=r, COMET=len(set(t) & set(r)) / 10) for s, t, r in zip(*lines)]
json.dump({{words["-t"]: rows}}, open(words["--to_json"], "w"))
open("{log}", "a").write("called\\n")
"""


def test_comet_scores_are_asked_for_once_and_averaged(settings, tmp_path, monkeypatch):
    """The command is a stand-in: unbabel-comet cannot live beside the transformers that mlalign needs."""
    rows = [{"prompt": p, "completion": f" {p}", "lang": "en-de", "src": "a\nb", "tgt_lang": "de"} for p in PROMPTS]
    asked = replace(
        settings, task="translation", test=(str(write_jsonl(tmp_path / "mt.jsonl", rows)),), comet="some/model"
    )
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"comet needs the command comet-score, which is not on PATH"):
        evaluate(asked)
    command = tmp_path / "comet-score"
    command.write_text(COMMAND.format(python=sys.executable, log=tmp_path / "log"))
    command.chmod(command.stat().st_mode | stat.S_IEXEC)
    (report,) = evaluate(asked)
    wanted = [len(set(text) & set(rows[int(i)]["prompt"])) / 10 for i, text in enumerate(texts_of(settings.output))]
    assert report["scores"]["comet"]["en-de"] == pytest.approx(sum(wanted) / len(wanted), abs=1e-6)
    assert evaluate(asked) == [report]
    assert (tmp_path / "log").read_text() == "called\n"
    command.write_text("#!/bin/sh\necho out of memory >&2; exit 1\n")
    with pytest.raises(UserError, match=r"comet-score --model another failed: out of memory"):
        evaluate(replace(asked, comet="another"))


def texts_of(folder: Path) -> list[str]:
    lines = (folder / "predictions" / "en-de.jsonl").read_text().splitlines()
    return [" ".join(json.loads(line)["prediction"].split()) for line in lines]
