// What an application can do with OpenAI's SDK for Node, against the gateway and two models, processes all three.
import assert from 'node:assert/strict';
import { test, beforeEach } from 'node:test';
import OpenAI from 'openai';
import { ContentFilterFinishReasonError, LengthFinishReasonError } from 'openai/core/error';
import { ChatCompletionStream } from 'openai/lib/ChatCompletionStream';
import { zodResponseFormat, zodFunction } from 'openai/helpers/zod';
import { z } from 'zod';

const { COWEST_URL, COWEST_KEY, OTHER_KEY, STRONG_URL, WEAK_URL } = process.env;
const client = new OpenAI({ baseURL: `${COWEST_URL}/v1`, apiKey: COWEST_KEY, maxRetries: 0, timeout: 30_000 });
const messages = [{ role: 'user', content: 'why is the sky blue?' }];
const asked = { model: 'pair', messages };
const say = (text, more = {}) => ({ say: text, ...more });
const weather = {
  type: 'function',
  function: {
    name: 'weather',
    parameters: { type: 'object', properties: { city: { type: 'string' } }, required: ['city'] },
  },
};
const clock = { type: 'function', function: { name: 'clock', parameters: { type: 'object', properties: {} } } };
const Plan = z.object({ what: z.string(), minutes: z.number().int(), is_done: z.boolean() });
const plan = { what: 'text', minutes: 7, is_done: true };

const told = async (url) => (await fetch(`${url}/calls`)).json();
const calls = async (url = STRONG_URL) => (await told(url)).calls;
const until = async (condition) => {
  const deadline = Date.now() + 15_000;
  while (!(await condition())) {
    assert.ok(Date.now() < deadline, 'waited in vain');
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
};
const collected = async (stream) => {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
};
const raised = (call) => call.then(() => assert.fail('nothing was raised'), (error) => error);
const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta.content ?? '').join('');

beforeEach(async () => {
  for (const url of [STRONG_URL, WEAK_URL]) await fetch(`${url}/calls`, { method: 'DELETE' });
});

test('a plain answer comes with id, model, usage and request id', async () => {
  const answer = await client.chat.completions.create({ ...asked, metadata: say('one two') });
  assert.equal(answer.choices[0].message.content, 'one two');
  assert.equal(answer.choices[0].finish_reason, 'stop');
  assert.equal(answer.model, 'pair');
  assert.equal(answer.usage.completion_tokens, 2);
  assert.ok(answer._request_id);
});

test('the weak model drafts and the strong one sees the draft', async () => {
  await client.chat.completions.create(asked);
  assert.equal((await calls(WEAK_URL)).length, 1);
  assert.match((await calls())[0].body.messages[0].content, /<draft>\necho: why is the sky blue\?/);
});

for (const role of ['system', 'developer']) {
  test(`instructions go to both models: ${role}`, async () => {
    await client.chat.completions.create({ model: 'pair', messages: [{ role, content: 'be brief' }, ...messages] });
    for (const url of [WEAK_URL, STRONG_URL]) {
      assert.deepEqual((await calls(url))[0].body.messages[0], { role, content: 'be brief' });
    }
  });
}

test('names and a thousand earlier turns stay as they are', async () => {
  const turns = Array.from({ length: 1000 }, (_, n) =>
    n % 2 ? { role: 'assistant', content: `answer ${n}` } : { role: 'user', name: 'ann', content: `question ${n}` },
  );
  await client.chat.completions.create({ model: 'pair', messages: [...turns, ...messages] });
  assert.deepEqual((await calls())[0].body.messages.slice(0, -1), turns);
});

test('text in parts is drafted for', async () => {
  const content = [{ type: 'text', text: 'why' }, { type: 'text', text: 'is it blue?' }];
  const answer = await client.chat.completions.create({ model: 'pair', messages: [{ role: 'user', content }] });
  assert.ok(answer.choices[0].message.content.startsWith('echo: why\nis it blue?'));
  assert.equal((await calls(WEAK_URL)).length, 1);
});

test('empty content goes to the strong model alone', async () => {
  const answer = await client.chat.completions.create({ model: 'pair', messages: [{ role: 'user', content: '' }] });
  assert.equal(answer.choices[0].message.content, 'echo: ');
  assert.equal((await calls(WEAK_URL)).length, 0);
});

test('parameters reach the strong model as they are', async () => {
  const given = { temperature: 0.2, top_p: 0.9, seed: 7, stop: ['sky'], store: true, reasoning_effort: 'low' };
  await client.chat.completions.create({ ...asked, ...given });
  const { body } = (await calls())[0];
  for (const [name, value] of Object.entries(given)) assert.deepEqual(body[name], value);
});

test('what only other endpoints know reaches the strong model too', async () => {
  await client.chat.completions.create({ ...asked, top_k: 5, metadata: { team: 'claims' } });
  const { body } = (await calls())[0];
  assert.deepEqual([body.top_k, body.metadata], [5, { team: 'claims' }]);
});

test('a stop word ends the answer', async () => {
  const answer = await client.chat.completions.create({ ...asked, stop: 'sky' });
  assert.equal(answer.choices[0].message.content, 'echo: why is the ');
});

for (const name of ['max_tokens', 'max_completion_tokens']) {
  test(`an answer of at most so many tokens ends for its length: ${name}`, async () => {
    const [choice] = (await client.chat.completions.create({ ...asked, [name]: 2 })).choices;
    assert.deepEqual([choice.message.content, choice.finish_reason], ['echo: why', 'length']);
  });
}

test('the user stays unknown to both models', async () => {
  await client.chat.completions.create({ ...asked, user: 'ann@example.org' });
  const seen = JSON.stringify([await calls(), await calls(WEAK_URL)]);
  assert.ok(!seen.includes('ann@example.org'));
});

test('headers of the SDK, its key among them, stay here, and queries do no harm', async () => {
  const team = new OpenAI({ baseURL: `${COWEST_URL}/v1`, apiKey: COWEST_KEY, organization: 'org-1', project: 'p' });
  const given = { headers: { 'x-team': 'claims' }, query: { 'api-version': '2026-01-01' } };
  assert.ok((await team.chat.completions.create(asked, given)).choices.length);
  for (const { headers } of [...(await calls()), ...(await calls(WEAK_URL))]) {
    assert.deepEqual(Object.keys(headers).filter((name) => /^(x-stainless|openai-|x-team)/.test(name)), []);
    assert.ok(!JSON.stringify(headers).includes(COWEST_KEY));
  }
});

test('several answers come of one draft', async () => {
  const answer = await client.chat.completions.create({ ...asked, n: 3 });
  assert.deepEqual(answer.choices.map((choice) => choice.index), [0, 1, 2]);
  assert.equal((await calls(WEAK_URL)).length, 1);
});

test('log probabilities come back', async () => {
  const answer = await client.chat.completions.create({ ...asked, logprobs: true, top_logprobs: 1 });
  assert.equal(answer.choices[0].logprobs.content[0].token, 'echo:');
  assert.equal(answer.choices[0].logprobs.content[0].top_logprobs.length, 1);
});

test('any text comes through unharmed', async () => {
  const content = 'žluťoučký 你好 🦜 "quotes" \\ \n {query} '.repeat(2000);
  const answer = await client.chat.completions.create({ model: 'pair', messages: [{ role: 'user', content }] });
  assert.ok(answer.choices[0].message.content.startsWith(`echo: ${content}`));
});

for (const [name, text] of [
  ['many scripts', 'žluťoučký kůň 你好 مرحبا 🦜👩‍👩‍👧'],
  ['what needs escapes', '"quotes" \\ and \n lines \t \u2028 \u0000 and {query} {draft}'],
  ['300,000 characters', 'x'.repeat(300_000)],
]) {
  test(`any text comes through a stream unharmed: ${name}`, async () => {
    const stream = await client.chat.completions.create({
      model: 'pair', messages: [{ role: 'user', content: text }], stream: true,
    });
    assert.ok(textOf(await collected(stream)).startsWith(`echo: ${text}`));
  });
}

test('usage counts both models, each by itself', async () => {
  const { usage } = await client.chat.completions.create({ ...asked, metadata: say('three words here') });
  assert.deepEqual([usage.completion_tokens, usage.prompt_tokens_details.cached_tokens], [3, 1]);
  assert.ok(usage.cowest.weak.completion_tokens > 3);
  assert.equal(usage.cowest.total_tokens, usage.total_tokens + usage.cowest.weak.total_tokens);
});

test('a stream is the answer in pieces with one id', async () => {
  const chunks = await collected(
    await client.chat.completions.create({ ...asked, stream: true, metadata: say('one two three') }),
  );
  assert.equal(textOf(chunks), 'one two three');
  assert.equal(new Set(chunks.map((chunk) => chunk.id)).size, 1);
  assert.equal(chunks.at(-1).choices[0].finish_reason, 'stop');
});

test('a stream tells the usage in its last chunk to who asks', async () => {
  const chunks = await collected(
    await client.chat.completions.create({
      ...asked, stream: true, stream_options: { include_usage: true }, metadata: say('a b c'),
    }),
  );
  assert.deepEqual(chunks.at(-1).choices, []);
  assert.equal(chunks.at(-1).usage.completion_tokens, 3);
});

test('a stream tells no usage to who does not ask', async () => {
  const chunks = await collected(await client.chat.completions.create({ ...asked, stream: true }));
  assert.ok(chunks.every((chunk) => chunk.choices.length === 1 && !chunk.usage));
});

test('several answers are streamed side by side', async () => {
  const chunks = await collected(await client.chat.completions.create({ ...asked, stream: true, n: 2 }));
  const [one, other] = [0, 1].map((n) => textOf(chunks.filter((chunk) => chunk.choices[0]?.index === n)));
  assert.equal(other, `${one} #1`);
});

test('log probabilities are streamed with their tokens', async () => {
  const stream = client.chat.completions.stream({ ...asked, logprobs: true, metadata: say('a b') });
  const seen = [];
  stream.on('logprobs.content.delta', ({ content }) => seen.push(...content.map(({ token }) => token)));
  await stream.done();
  assert.deepEqual(seen, ['a', 'b']);
});

test('a refusal is streamed', async () => {
  const stream = client.chat.completions.stream({ ...asked, metadata: { refuse: 'I will not.' } });
  const [{ refusal }] = await Promise.all([stream.emitted('refusal.done'), stream.done()]);
  assert.equal(refusal, 'I will not.');
});

test('a stream is read twice', async () => {
  const stream = await client.chat.completions.create({ ...asked, stream: true, metadata: say('one two') });
  assert.deepEqual((await Promise.all(stream.tee().map(collected))).map(textOf), ['one two', 'one two']);
});

test('a stream is handed on to a browser and read there', async () => {
  const stream = client.chat.completions.stream({ ...asked, metadata: say('one two') });
  const there = ChatCompletionStream.fromReadableStream(stream.toReadableStream());
  assert.equal(await there.finalContent(), 'one two');
});

test('the helper for streams puts the answer together', async () => {
  const stream = client.chat.completions.stream({ ...asked, metadata: say('one two') });
  const pieces = [];
  stream.on('content', (piece) => pieces.push(piece));
  assert.equal(await stream.finalContent(), 'one two');
  assert.equal(pieces.join(''), 'one two');
});

test('a stream that its reader leaves is left by the gateway too', async () => {
  const stream = await client.chat.completions.create({
    ...asked, stream: true, metadata: say('word '.repeat(500), { pause: '0.05' }),
  });
  for await (const _ of stream) break;
  await until(async () => (await told(STRONG_URL)).broken_off === 1);
});

test('a stream whose helper is aborted is left by the gateway too', async () => {
  const stream = client.chat.completions.stream({ ...asked, metadata: say('word '.repeat(500), { pause: '0.05' }) });
  stream.once('content', () => stream.abort());
  await assert.rejects(stream.done(), OpenAI.APIUserAbortError);
  await until(async () => (await told(STRONG_URL)).broken_off === 1);
});

test('a stream whose signal is aborted ends, and is left by the gateway too', async () => {
  const controller = new AbortController();
  const stream = await client.chat.completions.create(
    { ...asked, stream: true, metadata: say('word '.repeat(500), { pause: '0.05' }) }, { signal: controller.signal },
  );
  let count = 0;
  for await (const _ of stream) if (++count === 3) controller.abort();
  assert.ok(count < 500);
  await until(async () => (await told(STRONG_URL)).broken_off === 1);
});

test('an aborted call frees the strong model', async () => {
  const controller = new AbortController();
  const call = client.chat.completions.create({ ...asked, metadata: { seconds: '30' } }, { signal: controller.signal });
  await until(async () => (await calls()).length === 1);
  controller.abort();
  await assert.rejects(call, OpenAI.APIUserAbortError);
  await until(async () => (await told(STRONG_URL)).broken_off === 1);
});

test('a stream that breaks off raises an error', async () => {
  const stream = await client.chat.completions.create({
    ...asked, stream: true, metadata: say('one two three', { cut: '2' }),
  });
  await assert.rejects(collected(stream), (error) => error instanceof OpenAI.APIError && error.code === 'strong_failed');
});

test('the helper for streams raises the error of a stream that breaks off', async () => {
  const stream = client.chat.completions.stream({ ...asked, metadata: say('one two three', { cut: '2' }) });
  const error = await raised(stream.finalContent());
  assert.ok(error instanceof OpenAI.APIError && error.code === 'strong_failed', String(error));
});

test('a stream that fails before its first chunk has the status of its fault', async () => {
  const error = await raised(
    client.chat.completions.create({ ...asked, stream: true, metadata: { fail: '500', id: 'node-before' } }),
  );
  assert.ok(error instanceof OpenAI.InternalServerError);
  assert.deepEqual([error.status, error.code], [502, 'strong_failed']);
});

test('tools go to the strong model alone and their calls come back', async () => {
  const answer = await client.chat.completions.create({ ...asked, tools: [weather] });
  assert.equal(answer.choices[0].finish_reason, 'tool_calls');
  assert.equal(answer.choices[0].message.tool_calls[0].function.name, 'weather');
  assert.equal((await calls(WEAK_URL)).length, 0);
});

for (const [name, given, called] of [
  ['side by side', {}, ['weather', 'clock']],
  ['one after the other', { parallel_tool_calls: false }, ['weather']],
  ['by name', { tool_choice: { type: 'function', function: { name: 'clock' } } }, ['clock']],
  ['required', { tool_choice: 'required' }, ['weather', 'clock']],
  ['none', { tool_choice: 'none' }, []],
]) {
  test(`tools are called as the client says: ${name}`, async () => {
    const answer = await client.chat.completions.create({ ...asked, tools: [weather, clock], ...given });
    assert.deepEqual((answer.choices[0].message.tool_calls ?? []).map((call) => call.function.name), called);
    for (const [name, value] of Object.entries(given)) assert.deepEqual((await calls())[0].body[name], value);
  });
}

test('the whole conversation with a tool is left to the strong model', async () => {
  const { message } = (await client.chat.completions.create({ ...asked, tools: [weather] })).choices[0];
  const result = { role: 'tool', tool_call_id: message.tool_calls[0].id, content: 'sunny' };
  const turns = [...messages, message, result];
  const answer = await client.chat.completions.create({ model: 'pair', messages: turns, tools: [weather] });
  assert.equal(answer.choices[0].message.content, 'echo: sunny');
  assert.deepEqual((await calls())[1].body.messages, turns);
  assert.equal((await calls(WEAK_URL)).length, 0);
});

test('the old functions are left to the strong model too', async () => {
  await client.chat.completions.create({ ...asked, functions: [weather.function], function_call: 'auto' });
  assert.deepEqual((await calls())[0].body.functions, [weather.function]);
  assert.equal((await calls(WEAK_URL)).length, 0);
});

test('tool calls are streamed piece by piece', async () => {
  const stream = client.chat.completions.stream({ ...asked, tools: [weather] });
  const message = await stream.finalMessage();
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: 'text' });
});

test('the deltas of tool calls side by side come with their numbers', async () => {
  const parts = [];
  for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, tools: [weather, clock] })) {
    for (const call of chunk.choices[0].delta.tool_calls ?? []) {
      parts[call.index] = (parts[call.index] ?? '') + (call.function.name ?? '') + (call.function.arguments ?? '');
    }
  }
  assert.deepEqual(parts, ['weather{"city": "text"}', 'clock{}']);
});

test('the helper for streams tells when the arguments of each tool are whole', async () => {
  const stream = client.chat.completions.stream({ ...asked, tools: [weather, clock] });
  const seen = [];
  stream.on('tool_calls.function.arguments.done', (call) => seen.push([call.index, call.name, call.arguments]));
  await stream.done();
  assert.deepEqual(seen, [[0, 'weather', '{"city": "text"}'], [1, 'clock', '{}']]);
});

test('runTools calls the function and goes on with its result', async () => {
  const seen = [];
  const runner = client.chat.completions.runTools({
    ...asked,
    tools: [
      zodFunction({
        name: 'weather',
        parameters: z.object({ city: z.string() }),
        function: ({ city }) => { seen.push(city); return 'sunny'; },
      }),
    ],
  });
  assert.equal(await runner.finalContent(), 'echo: sunny');
  assert.deepEqual(seen, ['text']);
});

test('runTools streams the call, and the answer to its result', async () => {
  const pieces = [];
  const runner = client.chat.completions
    .runTools({
      ...asked,
      stream: true,
      tools: [zodFunction({ name: 'weather', parameters: z.object({ city: z.string() }), function: () => 'sunny' })],
    })
    .on('content', (piece) => pieces.push(piece));
  assert.equal(await runner.finalContent(), 'echo: sunny');
  assert.equal(pieces.join(''), 'echo: sunny');
  assert.equal(await runner.finalFunctionToolCallResult(), 'sunny');
});

test('parse gives the arguments of a tool as an object', async () => {
  const tools = [zodFunction({ name: 'plan', parameters: Plan })];
  const answer = await client.chat.completions.parse({ ...asked, tools });
  assert.deepEqual(answer.choices[0].message.tool_calls[0].function.parsed_arguments, plan);
});

test('parse gives an object of the schema', async () => {
  const answer = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Plan, 'plan') });
  assert.deepEqual(answer.choices[0].message.parsed, plan);
});

test('what was parsed has its request id', async () => {
  const answer = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Plan, 'plan') });
  assert.ok(answer._request_id);
});

test('parse tells a refusal', async () => {
  const answer = await client.chat.completions.parse({
    ...asked, response_format: zodResponseFormat(Plan, 'plan'), metadata: { refuse: 'No.' },
  });
  const { parsed, refusal } = answer.choices[0].message;
  assert.deepEqual([parsed, refusal], [null, 'No.']);
});

for (const [finish, kind] of [
  ['length', LengthFinishReasonError],
  ['content_filter', ContentFilterFinishReasonError],
]) {
  test(`parse raises why an answer is not whole: ${finish}`, async () => {
    const call = client.chat.completions.parse({
      ...asked, response_format: zodResponseFormat(Plan, 'plan'), metadata: { finish },
    });
    await assert.rejects(call, kind);
  });
}

test('JSON without a schema is asked for with a draft', async () => {
  const answer = await client.chat.completions.create({ ...asked, response_format: { type: 'json_object' } });
  assert.deepEqual(JSON.parse(answer.choices[0].message.content), { ok: true });
  assert.equal((await calls(WEAK_URL)).length, 1);
});

test('a structured answer is parsed from a stream', async () => {
  const stream = client.chat.completions.stream({ ...asked, response_format: zodResponseFormat(Plan, 'plan') });
  assert.deepEqual((await stream.finalChatCompletion()).choices[0].message.parsed, plan);
});

test('a refusal is no content', async () => {
  const answer = await client.chat.completions.create({ ...asked, metadata: { refuse: 'No.' } });
  assert.equal(answer.choices[0].message.content, null);
  assert.equal(answer.choices[0].message.refusal, 'No.');
});

for (const [name, part] of [
  ['an image', { type: 'image_url', image_url: { url: 'data:image/png;base64,iVBORw0KGgo=', detail: 'low' } }],
  ['audio', { type: 'input_audio', input_audio: { data: 'UklGRg==', format: 'wav' } }],
  ['a file', { type: 'file', file: { filename: 'a.pdf', file_data: 'data:,x' } }],
]) {
  test(`what is no text goes to the strong model alone, as it is: ${name}`, async () => {
    const content = [{ type: 'text', text: 'what is it?' }, part];
    await client.chat.completions.create({ model: 'pair', messages: [{ role: 'user', content }] });
    assert.deepEqual((await calls())[0].body.messages, [{ role: 'user', content }]);
    assert.equal((await calls(WEAK_URL)).length, 0);
  });
}

test('a spoken answer comes back', async () => {
  const given = { modalities: ['text', 'audio'], audio: { voice: 'alloy', format: 'wav' } };
  const { message } = (await client.chat.completions.create({ ...asked, ...given })).choices[0];
  assert.deepEqual([message.content, message.audio.transcript], [null, 'hi']);
});

test('the response gives its headers', async () => {
  const { response, request_id } = await client.chat.completions.create(asked).withResponse();
  assert.equal(response.headers.get('x-cowest-mode'), 'Pair');
  assert.equal(response.headers.get('x-request-id'), request_id);
});

test('the raw response is a chat completion as JSON', async () => {
  const response = await client.chat.completions.create(asked).asResponse();
  assert.equal(response.headers.get('content-type'), 'application/json');
  assert.equal((await response.json()).object, 'chat.completion');
});

test('the headers of a stream are there before its first chunk, and no two answers have one id', async () => {
  const ids = [];
  for (let n = 0; n < 2; n++) {
    const metadata = say('one two', { pause: '60', pause_at: '1' });
    const { data, response, request_id } = await client.chat.completions
      .create({ ...asked, stream: true, metadata })
      .withResponse();
    assert.match(response.headers.get('content-type'), /^text\/event-stream/);
    ids.push(request_id);
    data.controller.abort();
  }
  assert.ok(ids[0] && ids[1] && ids[0] !== ids[1]);
});

test('feedback is sent by the id of its answer', async () => {
  const { _request_id } = await client.chat.completions.create(asked);
  const told = await client.post('/feedback', { body: { request_id: _request_id, thumb: 'up' } });
  assert.ok(told.id);
});

test('an idempotency key goes along, and is of one client alone', async () => {
  const given = { headers: { 'Idempotency-Key': 'node-order-1' } };
  const other = client.withOptions({ apiKey: OTHER_KEY });
  for (const each of [client, client, other]) await each.chat.completions.create(asked, given);
  const [one, again, others] = (await calls()).map(({ headers }) => headers['idempotency-key']);
  assert.equal(one, again);
  assert.notEqual(one, others);
});

test('the raw response of a stream ends with the word that its record is durable', async () => {
  let text = '';
  while (!text.includes(': trace durable')) { // as while the disk is slow
    const response = await client.chat.completions.create({ ...asked, stream: true }).asResponse();
    text = await response.text();
  }
  assert.match(text, /\n\n: trace durable\n\ndata: \[DONE\]\n\n$/);
});

test('a wrong key is an authentication error', async () => {
  const stranger = new OpenAI({ baseURL: `${COWEST_URL}/v1`, apiKey: 'wrong', maxRetries: 0 });
  await assert.rejects(
    stranger.chat.completions.create(asked),
    (error) => error instanceof OpenAI.AuthenticationError && error.code === 'invalid_api_key' && !!error.requestID,
  );
});

test('a bad request names its field', async () => {
  await assert.rejects(
    client.chat.completions.create({ model: 'pair', messages: [] }),
    (error) => error instanceof OpenAI.BadRequestError && error.param === 'messages',
  );
});

test('what the strong model finds wrong is told with its code', async () => {
  const error = JSON.stringify({ message: 'too long', param: 'messages', code: 'context_length_exceeded' });
  await assert.rejects(
    client.chat.completions.create({ ...asked, metadata: { fail: '400', id: 'node-long', error } }),
    (raised) => raised instanceof OpenAI.BadRequestError && raised.code === 'context_length_exceeded',
  );
});

for (const [fails, kind, status, code] of [
  ['401', OpenAI.InternalServerError, 502, 'strong_failed'],
  ['403', OpenAI.InternalServerError, 502, 'strong_failed'],
  ['404', OpenAI.InternalServerError, 502, 'strong_failed'],
  ['408', OpenAI.InternalServerError, 502, 'strong_failed'],
  ['409', OpenAI.InternalServerError, 502, 'strong_failed'],
  ['413', OpenAI.APIError, 413, 'refused_by_model'],
  ['422', OpenAI.UnprocessableEntityError, 422, 'refused_by_model'],
  ['429', OpenAI.RateLimitError, 429, 'rate_limited'],
  ['500', OpenAI.InternalServerError, 502, 'strong_failed'],
  ['503', OpenAI.InternalServerError, 503, 'strong_failed'],
]) {
  test(`a strong model's ${fails} is an error of the SDK's own kind, with its request id`, async () => {
    const error = await raised(client.chat.completions.create({ ...asked, metadata: { fail: fails, id: `node-kind-${fails}` } }));
    assert.ok(error instanceof kind, String(error));
    assert.deepEqual([error.status, error.code], [status, code]);
    assert.ok(error.requestID && error.type && error.message);
    assert.ok((await client.chat.completions.create(asked)).choices.length);
  });
}

test('a body that is too large is told so', async () => {
  const content = 'x'.repeat(5 * 1024 * 1024);
  const error = await raised(client.chat.completions.create({ model: 'pair', messages: [{ role: 'user', content }] }));
  assert.deepEqual([error.status, error.code], [413, 'body_too_large']);
});

test('other endpoints say what there is', async () => {
  for (const call of [
    () => client.embeddings.create({ model: 'pair', input: 'x' }),
    () => client.responses.create({ model: 'pair', input: 'x' }),
    () => client.completions.create({ model: 'pair', prompt: 'x' }),
  ]) {
    await assert.rejects(
      call(), (error) => error instanceof OpenAI.NotFoundError && /POST \/v1\/chat\/completions/.test(error.message),
    );
  }
});

test('the SDK tries again when the strong model fails once', async () => {
  for (const fail of ['429', '500', '503']) {
    const metadata = { fail, id: `node-${fail}`, headers: '{"retry-after-ms": "20"}', say: 'at last' };
    const answer = await client.chat.completions.create({ ...asked, metadata }, { maxRetries: 2 });
    assert.equal(answer.choices[0].message.content, 'at last');
  }
  assert.equal((await calls()).length, 6);
});

test('the SDK tries a stream again', async () => {
  const metadata = { fail: '503', id: 'node-again', headers: '{"retry-after-ms": "20"}', say: 'at last' };
  const stream = await client.chat.completions.create({ ...asked, stream: true, metadata }, { maxRetries: 1 });
  assert.equal(textOf(await collected(stream)), 'at last');
});

test('the SDK gives up after its retries and raises the last error', async () => {
  const metadata = { fail: '500', id: 'node-gives-up', times: '9', headers: '{"retry-after-ms": "20"}' };
  const error = await raised(client.chat.completions.create({ ...asked, metadata }, { maxRetries: 2 }));
  assert.ok(error instanceof OpenAI.InternalServerError);
  assert.equal((await calls()).length, 3);
});

test('the SDK waits as long as the strong model asks', async () => {
  const began = performance.now();
  const metadata = { fail: '429', id: 'node-patience', headers: '{"retry-after": "1"}' };
  await client.chat.completions.create({ ...asked, metadata }, { maxRetries: 1 });
  assert.ok(performance.now() - began >= 990);
});

test('the SDK does not ask again with what is wrong in itself', async () => {
  const metadata = { fail: '400', id: 'node-never', times: '9' };
  await assert.rejects(client.chat.completions.create({ ...asked, metadata }, { maxRetries: 3 }), OpenAI.BadRequestError);
  assert.equal((await calls()).length, 1);
});

test('the SDK does not ask again an account without quota', async () => {
  const error = JSON.stringify({ message: 'no quota', type: 'insufficient_quota', code: 'insufficient_quota' });
  const metadata = { fail: '429', id: 'node-quota', times: '9', error };
  await assert.rejects(client.chat.completions.create({ ...asked, metadata }, { maxRetries: 3 }), OpenAI.RateLimitError);
  assert.equal((await calls()).length, 1);
});

test('the SDK does not ask again where the gateway knows it to be in vain', async () => {
  const metadata = { fail: '401', id: 'node-vain', times: '9' };
  await assert.rejects(client.chat.completions.create({ ...asked, metadata }, { maxRetries: 3 }), OpenAI.InternalServerError);
  assert.equal((await calls()).length, 1);
});

test('a rate limit says when to come back', async () => {
  const metadata = { fail: '429', id: 'node-limit', headers: '{"retry-after": "7"}' };
  await assert.rejects(
    client.chat.completions.create({ ...asked, metadata }),
    (error) => error instanceof OpenAI.RateLimitError && error.headers.get('retry-after') === '7',
  );
});

test('a client that waits no longer raises a timeout', async () => {
  await assert.rejects(
    client.chat.completions.create({ ...asked, metadata: { seconds: '10' } }, { timeout: 500 }),
    OpenAI.APIConnectionTimeoutError,
  );
});

test('a timeout is tried again, and each call is left', async () => {
  const call = client.chat.completions.create({ ...asked, metadata: { seconds: '30' } }, { timeout: 3000, maxRetries: 1 });
  await assert.rejects(call, OpenAI.APIConnectionTimeoutError);
  await until(async () => (await told(STRONG_URL)).broken_off >= 2);
});

test('models are listed and told by name', async () => {
  const { data } = await client.models.list();
  assert.deepEqual(data.map((model) => model.id), ['cowest']);
  assert.equal((await client.models.retrieve('cowest')).object, 'model');
  await assert.rejects(client.models.retrieve('gpt-9'), OpenAI.NotFoundError);
});

test('the list of models is walked through', async () => {
  const seen = [];
  for await (const model of client.models.list()) seen.push(model.owned_by);
  assert.deepEqual(seen, ['cowest']);
});

test('two hundred calls at once are all answered, each with its own', async () => {
  const answers = await Promise.all(
    Array.from({ length: 200 }, (_, n) => client.chat.completions.create({ ...asked, metadata: say(`answer ${n}`) })),
  );
  answers.forEach((answer, n) => assert.equal(answer.choices[0].message.content, `answer ${n}`));
});

test('a hundred streams at once are all answered, each with its own', async () => {
  const texts = await Promise.all(
    Array.from({ length: 100 }, async (_, n) =>
      textOf(await collected(await client.chat.completions.create({ ...asked, stream: true, metadata: say(`answer ${n}`) }))),
    ),
  );
  texts.forEach((text, n) => assert.equal(text, `answer ${n}`));
});
