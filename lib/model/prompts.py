"""How a scenario and a response become tokens, and which of the tokens are the response.

The response's tokens are found by character offsets in the tokenised whole text, never by tokenising prompt and
response apart: merging across the boundary would shift them.
"""

from dataclasses import dataclass

from lib.errors import BadInput

PLAIN = "Message:\n{scenario}\n\nReply:\n"


@dataclass(frozen=True)
class Encoded:
    """One text as tokens: `ids` of prompt and response; the response is `ids[start:]`."""

    ids: tuple[int, ...]
    start: int


def prompt_text(tokenizer, template: str, scenario: str, *, instruction: str = "") -> str:
    """Everything before the response: the chat template's opening turns, or a plain frame for base models."""
    if not scenario.strip():
        raise BadInput("scenario: is empty; give the model something to answer")
    content = f"{scenario}\n\n{instruction}" if instruction else scenario
    if template == "plain":
        return (tokenizer.bos_token or "") + PLAIN.format(scenario=content)
    if tokenizer.chat_template is None:
        raise BadInput("model.template: is chat, but the tokenizer has no chat template; use plain")
    return tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)


def encode(tokenizer, template: str, scenario: str, response: str, *, instruction: str = "") -> Encoded:
    """Tokens of one prompt and response. Raises BadInput where a token straddles their boundary."""
    prompt = prompt_text(tokenizer, template, scenario, instruction=instruction)
    whole = tokenizer(prompt + response, add_special_tokens=False, return_offsets_mapping=True)
    boundary, offsets = len(prompt), whole["offset_mapping"]
    start = next((i for i, (_, stop) in enumerate(offsets) if stop > boundary), None)
    if start is None:
        raise BadInput(f"response {response[:40]!r}: gives no token")
    if offsets[start][0] < boundary:
        raise BadInput(f"response {response[:40]!r}: its first token also holds the end of the prompt; change model.template")
    return Encoded(tuple(whole["input_ids"]), start)
