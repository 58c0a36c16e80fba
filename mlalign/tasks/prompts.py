"""The two forms in which a task row is written: `chat` for instruction-tuned models, `plain` for base models."""

FORMS = ("chat", "plain")


def task_row(form: str, instruction: str, plain_prompt: str, text: str, answer: str) -> dict:
    """The fields that `mlalign train` learns from and `mlalign evaluate` prompts with.

    `chat`: the instruction is the system's turn, the text the user's, the answer the assistant's; the model's own chat
    template does the rest. `plain`: `plain_prompt` and the answer behind it, with a space between.
    """
    if form == "plain":
        return {"prompt": plain_prompt, "completion": f" {answer}"}
    turns = (("system", instruction), ("user", text), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}
