"""`generate` and `chat`: asking a base or a fine-tuned model."""

from typing import Annotated, Any

import typer

from tunesmith.commands.options import Adapter, AsJson, MaxNewTokens, Temperature


def generate(
    prompt: str,
    adapter: Adapter = None,
    raw: Annotated[bool, typer.Option("--raw", help="The prompt as it stands, without the model's template.")] = False,
    max_new_tokens: MaxNewTokens = 100,
    temperature: Temperature = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the text while it is written.")] = False,
    json: AsJson = False,
) -> None:
    """Ask a model. Prints the text; with --stream --json one object per token."""
    from tunesmith.output import full_model, session, show_json

    with session(timeout=600) as client:
        named = adapter and full_model(client, adapter)
        parameters = {"adapter_id": named, "max_new_tokens": max_new_tokens, "temperature": temperature}
        body: dict[str, Any] = {
            "inputs" if raw else "instruction": prompt,
            "parameters": {name: value for name, value in parameters.items() if value is not None},
        }
        if stream:
            _print_stream(client, body, json)
            return
        answer, _ = client.generate(body)
    if json:
        show_json(answer)
    else:
        print(answer["generated_text"])


def chat(
    adapter: Adapter = None,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = None,
    json: AsJson = False,
) -> None:
    """Talk to a model: one line is one question, and answers come as they are written. Ctrl-D ends it.

    '/reset' begins anew. With --json one message per line. Questions can be piped in.
    """
    from tunesmith.chat import Conversation, converse, questions
    from tunesmith.output import full_model, session

    with session(timeout=600) as client:
        named = adapter and full_model(client, adapter)
        fields = {"model": named, "max_tokens": max_new_tokens, "temperature": temperature or 0}
        settings = {name: value for name, value in fields.items() if value is not None}
        converse(questions(), Conversation(client.chat_stream, settings, system), json=json)


def _print_stream(client: Any, body: dict[str, Any], json: bool) -> None:
    from json import dumps

    with client.generate_stream(body) as events:
        for event in events:
            if json:
                print(dumps(event), flush=True)
            else:
                print(event["token"]["text"], end="", flush=True)
    if not json:
        print()
