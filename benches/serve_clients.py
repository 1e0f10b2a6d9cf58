"""OpenAI's Python client (`pip install openai`) against `landmark serve`, unchanged: sync, async, streams, errors, sessions beside it.

usage: serve_clients.py BINARY MODEL [--js DIR]

With --js, the same by OpenAI's JavaScript client: DIR is where `npm install openai` was run. Ends with an error at the first thing that is not as
OpenAI's interface has it.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import tempfile
import urllib.request

import openai

PROMPT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of"


def sync_client(url, model):
    client = openai.OpenAI(base_url=url, api_key="first")
    assert [each.id for each in client.models.list().data] == [model]
    assert client.models.retrieve(model).id == model
    whole = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
    assert whole.choices[0].text and whole.choices[0].finish_reason == "length" and whole.usage.completion_tokens == 24
    parts = list(client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}))
    assert "".join(part.choices[0].text for part in parts if part.choices) == whole.choices[0].text
    assert parts[-1].usage.completion_tokens == 24 and not parts[-1].choices
    drawn = client.completions.create(model=model, prompt=[PROMPT, "Once upon a time"], n=2, max_tokens=8, temperature=0.9, top_p=0.9, seed=7)
    again = client.completions.create(model=model, prompt=[PROMPT, "Once upon a time"], n=2, max_tokens=8, temperature=0.9, top_p=0.9, seed=7)
    assert len(drawn.choices) == 4 and [c.text for c in drawn.choices] == [c.text for c in again.choices]
    echoed = client.completions.create(model=model, prompt=PROMPT, max_tokens=2, temperature=0, echo=True, logprobs=3)
    logprobs = echoed.choices[0].logprobs
    assert "".join(logprobs.tokens) == echoed.choices[0].text and logprobs.token_logprobs[0] is None and len(logprobs.top_logprobs[-1]) == 3
    stopped = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0, stop=[whole.choices[0].text[5:9]])
    assert stopped.choices[0].finish_reason == "stop" and stopped.choices[0].text == whole.choices[0].text[:5]
    said = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is Anne?"}]
    chat = client.chat.completions.create(model=model, messages=said, max_completion_tokens=16, temperature=0, logprobs=True, top_logprobs=2)
    assert chat.choices[0].message.role == "assistant" and len(chat.choices[0].logprobs.content) == chat.usage.completion_tokens
    with client.chat.completions.stream(model=model, messages=said, max_completion_tokens=16, temperature=0) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        assert text == chat.choices[0].message.content
    for wrong, error in [
        (dict(prompt=PROMPT, max_tokens=-1), openai.BadRequestError),
        (dict(prompt=PROMPT, temperature=-1), openai.BadRequestError),
        (dict(prompt=PROMPT, logit_bias={"5": 1}), openai.BadRequestError),
    ]:
        try:
            client.completions.create(model=model, **wrong)
        except error as told:
            assert told.body["message"], told
        else:
            raise AssertionError(f"{wrong} was taken")
    try:
        client.completions.create(model="another", prompt=PROMPT)
    except openai.NotFoundError as told:
        assert told.code == "model_not_found"
    try:
        openai.OpenAI(base_url=url, api_key="wrong").models.list()
    except openai.AuthenticationError:
        pass
    else:
        raise AssertionError("a wrong key was let in")


async def async_client(url, model):
    async with openai.AsyncOpenAI(base_url=url, api_key="second") as client:

        async def stream(i):
            parts = await client.completions.create(model=model, prompt=f"{PROMPT} {i}", max_tokens=16, temperature=0, stream=True)
            return "".join([part.choices[0].text async for part in parts])

        texts = await asyncio.gather(*(stream(i) for i in range(6)))
        wholes = [await client.completions.create(model=model, prompt=f"{PROMPT} {i}", max_tokens=16, temperature=0) for i in range(6)]
        assert texts == [whole.choices[0].text for whole in wholes]
        # Who leaves makes room.
        parts = await client.completions.create(model=model, prompt=PROMPT, max_tokens=2000, stream=True)
        async for _ in parts:
            break
        await parts.close()
        said = [{"role": "user", "content": "Who is Anne?"}]
        chat = await client.chat.completions.create(model=model, messages=said, max_tokens=8)
        assert chat.usage.prompt_tokens_details.cached_tokens == 0


def sessions(url, model):
    """Ours, beside OpenAI's: a text that stays read, by the same client."""

    def ask(path, body):
        request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"Content-Type": "application/json", "Authorization": "Bearer first"})
        return json.load(urllib.request.urlopen(request))

    ask("/sessions", {"name": "told"})
    ask("/sessions/told/append", {"text": "The old house stood on a hill. " * 200})
    client = openai.OpenAI(base_url=url, api_key="first")
    reply = client.completions.create(model=model, prompt="The old", max_tokens=8, temperature=0, extra_body={"session": "told", "show_blocks": 3})
    assert len(reply.landmark["blocks"]) == 3 and reply.usage.prompt_tokens_details.cached_tokens > 500


JS = r"""
import OpenAI from "openai";
import assert from "node:assert/strict";
const [url, model, prompt] = process.argv.slice(2);
const client = new OpenAI({ baseURL: url, apiKey: "first" });
assert.deepEqual((await client.models.list()).data.map((each) => each.id), [model]);
const whole = await client.completions.create({ model, prompt, max_tokens: 24, temperature: 0 });
assert.equal(whole.usage.completion_tokens, 24);
let text = "", usage = null;
for await (const part of await client.completions.create({ model, prompt, max_tokens: 24, temperature: 0, stream: true, stream_options: { include_usage: true } })) {
  text += part.choices[0]?.text ?? "";
  usage = part.usage ?? usage;
}
assert.equal(text, whole.choices[0].text);
assert.equal(usage.completion_tokens, 24);
const messages = [{ role: "user", content: "Who is Anne?" }];
const chat = await client.chat.completions.create({ model, messages, max_completion_tokens: 12, temperature: 0, logprobs: true });
assert.equal(chat.choices[0].logprobs.content.length, chat.usage.completion_tokens);
const stream = client.chat.completions.stream({ model, messages, max_completion_tokens: 12, temperature: 0 });
assert.equal((await stream.finalChatCompletion()).choices[0].message.content, chat.choices[0].message.content);
const asked = await client.completions.create({ model, prompt: "The old", max_tokens: 8, temperature: 0, session: "told", show_blocks: 2 });
assert.equal(asked.landmark.blocks.length, 2);
await assert.rejects(client.completions.create({ model, prompt, max_tokens: -1 }), OpenAI.BadRequestError);
await assert.rejects(new OpenAI({ baseURL: url, apiKey: "wrong" }).models.list(), OpenAI.AuthenticationError);
const long = await client.completions.create({ model, prompt, max_tokens: 2000, stream: true });
for await (const _ of long) break;
console.log("JavaScript client: all as expected");
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary")
    parser.add_argument("model")
    parser.add_argument("--js")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        keys, template = os.path.join(folder, "keys"), os.path.join(folder, "template")
        with open(keys, "w") as file:
            file.write("first\nsecond\n")
        with open(template, "w") as file:
            file.write("{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:")
        command = [args.binary, "serve", "--checkpoint", args.model, "--sessions", os.path.join(folder, "sessions"), "--port", "0", "--device", "cpu"]
        server = subprocess.Popen(command + ["--api_key_file", keys, "--chat_template", template], stdout=subprocess.PIPE, text=True)
        try:
            url = "http://" + server.stdout.readline().split("http://")[1].strip()
            name = os.path.basename(os.path.normpath(args.model))
            sync_client(url, name)
            asyncio.run(async_client(url, name))
            sessions(url, name)
            print(f"Python client {openai.__version__}, sync and async: all as expected")
            if args.js:
                script = os.path.join(args.js, "serve_clients.mjs")
                with open(script, "w") as file:
                    file.write(JS)
                subprocess.run(["node", script, url, name, PROMPT], check=True)
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0


if __name__ == "__main__":
    main()
