#!/usr/bin/env python3
"""The official `openai` Python package against a running Ingle, unchanged: every call goes through its public API.

    tests/clients/test_openai.py http://127.0.0.1:8080 [--api-key KEY] [--overload]

--api-key   the server's key; a wrong one must then raise AuthenticationError
--overload  the server runs one sequence and queues few: a burst must raise RateLimitError

Exits with 1 if a check fails. `tests/clients/run` starts a server and calls this.
"""

import array
import argparse
import asyncio
import sys
import traceback

import openai

CHECKS = []


def check(function):
    CHECKS.append(function)
    return function


class Context:
    def __init__(self, args):
        self.base_url = args.base_url.rstrip("/") + "/v1"
        self.overload = args.overload
        self.key = args.api_key
        self.client = self.make(openai.OpenAI)
        self.card = self.client.models.list().data[0]
        self.model = self.card.id
        self.messages = [{"role": "user", "content": "Name three colours. 🙂 日本"}]

    def make(self, kind, **options):
        return kind(base_url=self.base_url, **{"api_key": self.key or "none", "max_retries": 0, **options})

    def chat(self, **options):
        options = {"model": self.model, "messages": self.messages, "temperature": 0, "max_completion_tokens": 16, **options}
        return self.client.chat.completions.create(**options)


def raises(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} expected, nothing raised")


@check
def models(c):
    listed = c.client.models.list()
    assert listed.object == "list" and all(m.object == "model" and m.created > 0 and m.owned_by for m in listed.data)
    assert c.client.models.retrieve(c.model).id == c.model
    assert c.card.max_model_len > 0


@check
def chat(c):
    answer = c.chat()
    choice = answer.choices[0]
    assert answer.object == "chat.completion" and answer.id and answer.created > 0 and answer.model
    assert choice.message.role == "assistant" and choice.message.content and choice.message.refusal is None
    assert choice.finish_reason in ("stop", "length") and choice.logprobs is None
    usage = answer.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert 0 < usage.completion_tokens <= 16
    assert answer._request_id


def embedding_model(c):
    """The first embedding model the server lists; `None` if it has none."""
    return next((m.id for m in c.client.models.list().data if getattr(m, "task", "") == "embed"), None)


@check
def embeddings(c):
    model = embedding_model(c)
    if model is None:
        return
    texts = ["the cat sat on the mat", "a dog", "", "日本 🙂"]
    # The client asks for base64 unless it is told otherwise.
    answer = c.client.embeddings.create(model=model, input=texts)
    assert answer.object == "list" and answer.model == model
    assert [item.index for item in answer.data] == [0, 1, 2, 3]
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > 4
    plain = c.client.embeddings.create(model=model, input=texts, encoding_format="float")
    # Decimal digits name the same f32; Python's own floats are wider.
    single = lambda item: array.array("f", item.embedding)
    assert [single(item) for item in plain.data] == [single(item) for item in answer.data]
    for text, item in zip(texts, answer.data):
        alone = c.client.embeddings.create(model=model, input=text)
        assert list(alone.data[0].embedding) == list(item.embedding)
        assert abs(sum(x * x for x in item.embedding) - 1) < 1e-3
    raises(openai.BadRequestError, lambda: c.client.embeddings.create(model=model, input=[]))
    raises(openai.BadRequestError, lambda: c.client.embeddings.create(model=model, input="a", dimensions=1))
    raises(openai.BadRequestError, lambda: c.client.embeddings.create(model=c.model, input="a"))
    raises(openai.NotFoundError, lambda: c.client.embeddings.create(model="nobody", input="a"))


@check
def chat_length(c):
    answer = c.chat(max_completion_tokens=5, extra_body={"ignore_eos": True})
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 5
    # The older name of the parameter.
    older = c.client.chat.completions.create(model=c.model, messages=c.messages, max_tokens=5, extra_body={"ignore_eos": True})
    assert older.usage.completion_tokens == 5


@check
def chat_stream_equals_whole_answer(c):
    whole = c.chat()
    chunks = list(c.chat(stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1 and {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    last, contents = chunks[-1], chunks[:-1]
    assert last.choices == []
    assert last.usage.prompt_tokens == whole.usage.prompt_tokens
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in contents)
    deltas = [chunk.choices[0].delta for chunk in contents]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasons = [chunk.choices[0].finish_reason for chunk in contents]
    assert reasons[-1] == whole.choices[0].finish_reason and not any(reasons[:-1])


@check
def chat_stream_helper(c):
    with c.client.chat.completions.stream(
        model=c.model, messages=c.messages, temperature=0, max_completion_tokens=16, stream_options={"include_usage": True}
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        # get_final_completion() raises for an answer that ends with `length`; this is what it would return.
        final = stream.current_completion_snapshot
    whole = c.chat()
    assert text == final.choices[0].message.content == whole.choices[0].message.content
    assert final.usage.completion_tokens == whole.usage.completion_tokens


@check
def chat_choices(c):
    answer = c.chat(n=2, temperature=1, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    seen = {}
    for chunk in c.chat(n=2, temperature=1, seed=1, stream=True):
        for choice in chunk.choices:
            seen.setdefault(choice.index, []).append(choice.finish_reason)
    assert sorted(seen) == [0, 1] and all(len([r for r in reasons if r]) == 1 for reasons in seen.values())


@check
def chat_logprobs(c):
    answer = c.chat(logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens or answer.choices[0].finish_reason == "stop"
    for entry in entries:
        alternatives = [top.logprob for top in entry.top_logprobs]
        assert entry.logprob <= 0 and len(alternatives) == 3 and alternatives == sorted(alternatives, reverse=True)
        assert entry.token == entry.top_logprobs[0].token and isinstance(entry.bytes, list)


@check
def chat_stop(c):
    text = c.chat(logprobs=True).choices[0].message.content
    stop = text[2:4]
    answer = c.chat(stop=stop).choices[0]
    assert answer.finish_reason == "stop" and answer.message.content == text[: text.index(stop)]


@check
def chat_with_history_and_seed(c):
    messages = [{"role": "system", "content": "Be brief."}, *c.messages, {"role": "assistant", "content": "Red."}, *c.messages]
    same = [c.chat(messages=messages, temperature=1, seed=7).choices[0].message.content for _ in range(2)]
    assert same[0] == same[1]


@check
def completions(c):
    create = lambda **options: c.client.completions.create(
        **{"model": c.model, "prompt": "Once upon a time", "temperature": 0, "max_tokens": 8, **options}
    )
    one = create()
    assert one.object == "text_completion" and one.choices[0].finish_reason in ("stop", "length")
    two = create(prompt=["Once upon a time", "Once upon a time"])
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[0].text == two.choices[1].text == one.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in create(stream=True) if chunk.choices) == one.choices[0].text
    assert create(prompt=[5, 6, 7]).usage.prompt_tokens == 3
    echoed = create(echo=True, logprobs=1)
    assert echoed.choices[0].text.startswith("Once upon a time")
    assert echoed.choices[0].logprobs.token_logprobs[0] is None
    offsets = echoed.choices[0].logprobs.text_offset
    assert offsets == sorted(offsets)


@check
def bad_requests(c):
    error = raises(openai.BadRequestError, lambda: c.chat(temperature=9))
    assert error.status_code == 400 and error.param == "temperature" and error.type == "invalid_request_error", error.body
    assert error.code and error.request_id
    assert "temperature" in raises(openai.BadRequestError, lambda: c.chat(temperature="hot")).message
    raises(openai.BadRequestError, lambda: c.chat(messages=[]))
    raises(openai.BadRequestError, lambda: c.chat(top_logprobs=21, logprobs=True, stream=True))
    raises(openai.BadRequestError, lambda: c.chat(max_completion_tokens=-1))


@check
def context_overflow(c):
    long = [{"role": "user", "content": "x y " * c.card.max_model_len}]
    for stream in (False, True):
        error = raises(openai.BadRequestError, lambda: c.chat(messages=long, stream=stream))
        assert error.code == "context_length_exceeded", error.body
        assert f"maximum context length is {c.card.max_model_len} tokens" in error.message


@check
def not_found(c):
    error = raises(openai.NotFoundError, lambda: c.chat(model="no-such-model"))
    assert error.code == "model_not_found" and "no-such-model" in error.message
    assert raises(openai.NotFoundError, lambda: c.client.models.retrieve("no/such/model")).status_code == 404
    raises(openai.NotFoundError, lambda: c.client.post("/no/such/route", cast_to=object, body={}))


@check
def authentication(c):
    if not c.key:
        return "no key set"
    error = raises(openai.AuthenticationError, lambda: c.make(openai.OpenAI, api_key="wrong").models.list())
    assert error.status_code == 401 and "www-authenticate" in error.response.headers
    assert c.key not in str(error.body)


@check
def asynchronous_and_abandoned_streams(c):
    async def ask():
        async with c.make(openai.AsyncOpenAI) as client:
            options = {"model": c.model, "messages": c.messages, "temperature": 0}
            stream = await client.chat.completions.create(**options, max_tokens=64, stream=True, extra_body={"ignore_eos": True})
            async for _ in stream:
                break
            await stream.close()
            answer = await client.chat.completions.create(**options, max_completion_tokens=16)
            return answer.choices[0].message.content

    assert asyncio.run(ask()) == c.chat().choices[0].message.content


@check
def rate_limit(c):
    if not c.overload:
        return "the server is not set up for it"

    async def burst():
        async with c.make(openai.AsyncOpenAI) as client:
            ask = lambda: client.chat.completions.create(
                model=c.model, messages=c.messages, max_tokens=100, extra_body={"ignore_eos": True}
            )
            return await asyncio.gather(*[ask() for _ in range(64)], return_exceptions=True)

    results = asyncio.run(burst())
    limited = [r for r in results if isinstance(r, openai.RateLimitError)]
    failed = [r for r in results if isinstance(r, Exception) and not isinstance(r, openai.RateLimitError)]
    assert not failed, failed[0]
    assert limited and len(limited) < len(results), f"{len(limited)} of {len(results)} refused"
    assert limited[0].status_code == 429 and int(limited[0].response.headers["retry-after"]) >= 1
    assert limited[0].type == "rate_limit_error"
    # And the package's own retries get through.
    assert c.make(openai.OpenAI, max_retries=5).chat.completions.create(model=c.model, messages=c.messages, max_tokens=2).choices


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("--api-key")
    parser.add_argument("--overload", action="store_true")
    context = Context(parser.parse_args())
    failed = skips = 0
    for function in CHECKS:
        try:
            skipped = function(context)
            skips += bool(skipped)
            print(f"{'skip' if skipped else 'ok  '} {function.__name__}{f' ({skipped})' if skipped else ''}")
        except Exception:
            failed += 1
            print(f"FAIL {function.__name__}")
            traceback.print_exc(file=sys.stdout)
    print(f"openai {openai.__version__} for Python: {len(CHECKS) - failed - skips} checks passed, {failed} failed, {skips} skipped")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
