"""A plain single-process PyTorch training loop with naive losses: what every number of ranks must reproduce.

It shares nothing with the package but the reading of rows and the order of examples.
"""

import math
import re

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from mlalign.config import Config
from mlalign.dataset import load_dataset
from mlalign.model import load_tokenizer


def task_loss(lm, examples) -> torch.Tensor:
    """Mean over all learned tokens, one row at a time."""
    total, count = 0.0, 0
    for example in examples:
        log_p = lm(input_ids=torch.tensor([example.ids])).logits[0].double().log_softmax(-1)
        for t, label in enumerate(example.labels):
            if t and label != -100:
                total, count = total - log_p[t - 1, label], count + 1
    return total / count


def embed(lm, ids: list[int], layer: int, pooling: str = "mean") -> torch.Tensor:
    states = lm(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0].double()
    pooled = {"mean": states.mean(0), "last": states[-1]}[pooling]
    return pooled / pooled.norm()


def same(a, b) -> bool:
    """Whether two pairs share a sentence or an id."""
    texts = {a.keys[0], a.keys[1]} & {b.keys[0], b.keys[1]}
    return bool(texts) or (a.keys[2] != 0 and a.keys[2] == b.keys[2])


def info_nce(rows, columns, positives, temperature: float) -> torch.Tensor:
    """Double loop over anchors and their positives; positives[i] = set of columns."""
    total = 0.0
    for i, row in enumerate(rows):
        score = [torch.dot(row, column) / temperature for column in columns]
        negatives = [score[j].exp() for j in range(len(columns)) if j not in positives[i]]
        terms = [-torch.log(score[p].exp() / (score[p].exp() + sum(negatives))) for p in positives[i]]
        total = total + sum(terms) / len(terms)
    return total / len(rows)


def alignment_loss(
    lm, pairs, layer: int, temperature: float, by_id: bool = True, symmetric: bool = True, pooling: str = "mean"
):
    src = [embed(lm, pair.src, layer, pooling) for pair in pairs]
    tgt = [embed(lm, pair.tgt, layer, pooling) for pair in pairs]
    n = len(pairs)
    positives = [{j for j in range(n) if i == j or (by_id and same(pairs[i], pairs[j]))} for i in range(n)]
    loss = info_nce(src, tgt, positives, temperature)
    return (loss + info_nce(tgt, src, positives, temperature)) / 2 if symmetric else loss


def load(config: Config):
    """The model, with adapters that start as the package's do."""
    lm = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    if config.lora is None:
        return lm
    torch.manual_seed(config.seed)
    r, alpha, modules = config.lora.r, config.lora.alpha, config.lora.target_modules
    return get_peft_model(lm, LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM"))


def adamw(parameters, config: Config) -> torch.optim.Optimizer:
    """Matrices are decayed, vectors (norms, biases) never."""
    matrices, vectors = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": config.optimizer.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}] if vectors else []
    return torch.optim.AdamW(groups, lr=config.optimizer.lr, betas=config.optimizer.betas, eps=config.optimizer.eps)


def lr_at(config: Config, step: int) -> float:
    """The learning rate of a step, from 0: up from 0 along a line, then down along a curve."""
    settings = config.optimizer
    warmup = round(settings.warmup_ratio * settings.steps)
    if step < warmup:
        return settings.lr * step / warmup
    if settings.schedule == "inverse_sqrt":  # continues a warmup, or one of 10,000 steps where there was none
        return settings.lr * math.sqrt(warmup / step if warmup else 10_000 / (10_000 + step))
    share = (step - warmup) / (settings.steps - warmup)
    return (
        settings.lr
        * {"constant": 1, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}[settings.schedule]
    )


def train(
    config: Config, layer: int | None = None, left_out: tuple[int, ...] = (), log: list[dict] | None = None
) -> dict[str, torch.Tensor]:
    """Joint or alternating steps. Returns every trainable parameter by name.

    layer: that of the config where it is not given. left_out: steps, from 0, of which the batches are drawn and nothing
    else happens. log: takes in, for each step, what metrics.jsonl should hold of it.
    """
    lm = load(config)
    names = [name for name, p in lm.named_parameters() if p.requires_grad]
    dataset = load_dataset(config, load_tokenizer(config.model))
    parameters = [p for p in lm.parameters() if p.requires_grad]
    optimizer = adamw(parameters, config)
    settings = config.alignment
    layer = layer or settings.layer
    task, align = config.interleave.parts
    cycle = ["task"] * task + ["align"] * align
    for step in range(config.optimizer.steps):
        now = cycle if config.interleave.mode == "joint" else [cycle[step % len(cycle)]]
        loss, values, contrasts = 0.0, {"train/lr": lr_at(config, step)}, []
        if "task" in now:
            loss = task_loss(lm, dataset.orders["task"].take(now.count("task") * config.task.batch_size))
            values["train/task_loss"] = float(loss.detach())
        for _ in range(now.count("align")):
            pairs = dataset.orders["alignment"].take(settings.batch_size)
            ways = settings.positives == "id", settings.infonce == "symmetric", settings.pooling
            contrasts.append(alignment_loss(lm, pairs, layer, settings.temperature, *ways))
        if contrasts:
            loss = loss + settings.weight * sum(contrasts) / len(contrasts)
            values["train/alignment_loss"] = float(sum(contrasts).detach() / len(contrasts))
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)  # DeepSpeed's optimizers see zeros, where torch has None
        loss.backward()
        if step in left_out:
            continue
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip or math.inf)
        if log is not None:
            log.append(values | {"train/grad_norm": float(norm)})
        for group in optimizer.param_groups:
            group["lr"] = values["train/lr"]
        resting = [p.detach().clone() for p in parameters] if "task" not in now else []
        optimizer.step()
        for name, parameter, before in zip(names, parameters, resting):
            if is_above(name, layer):
                parameter.data.copy_(before)
    return {name: p.detach().clone() for name, p in lm.named_parameters() if p.requires_grad}


def is_above(name: str, layer: int) -> bool:
    """Whether a Llama parameter lies above decoder block `layer`."""
    block = re.search(r"layers\.(\d+)\.", name)
    return int(block.group(1)) >= layer if block else "embed" not in name


def authors_train(config: Config, layer: int) -> dict[str, torch.Tensor]:
    """The objective of the authors' code on one rank: an objective per micro-batch, flipped after each and never reset.

    Each micro-batch's own mean loss is divided by the number of micro-batches; InfoNCE goes one way, with the
    micro-batch's other pairs as negatives, repeated sentences or not.
    """
    lm = load(config)
    dataset = load_dataset(config, load_tokenizer(config.model))
    parameters = [p for p in lm.parameters() if p.requires_grad]
    optimizer = adamw(parameters, config)
    on_task = True
    for _ in range(config.optimizer.steps):
        optimizer.zero_grad()
        for _ in range(config.interleave.micro_batches):
            if on_task:
                loss = task_loss(lm, dataset.orders["task"].take(config.task.batch_size))
            else:
                pairs = dataset.orders["alignment"].take(config.alignment.batch_size)
                loss = alignment_loss(lm, pairs, layer, config.alignment.temperature, by_id=False, symmetric=False)
            (loss / config.interleave.micro_batches).backward()
            on_task = not on_task
        torch.nn.utils.clip_grad_norm_(parameters, config.optimizer.clip)
        optimizer.step()
    return {name: p.detach().clone() for name, p in lm.named_parameters() if p.requires_grad}
