// What an application can do with OpenAI's SDK for Node, against the gateway and two models, processes all three.
import assert from 'node:assert/strict';
import { test, beforeEach } from 'node:test';
import OpenAI from 'openai';
import { zodResponseFormat, zodFunction } from 'openai/helpers/zod';
import { z } from 'zod';

const { COWEST_URL, COWEST_KEY, STRONG_URL, WEAK_URL } = process.env;
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

test('parameters reach the strong model as they are', async () => {
  const given = { temperature: 0.2, top_p: 0.9, seed: 7, stop: ['sky'], store: true, reasoning_effort: 'low' };
  await client.chat.completions.create({ ...asked, ...given });
  const { body } = (await calls())[0];
  for (const [name, value] of Object.entries(given)) assert.deepEqual(body[name], value);
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

test('tools go to the strong model alone and their calls come back', async () => {
  const answer = await client.chat.completions.create({ ...asked, tools: [weather] });
  assert.equal(answer.choices[0].finish_reason, 'tool_calls');
  assert.equal(answer.choices[0].message.tool_calls[0].function.name, 'weather');
  assert.equal((await calls(WEAK_URL)).length, 0);
});

test('tool calls are streamed piece by piece', async () => {
  const stream = client.chat.completions.stream({ ...asked, tools: [weather] });
  const message = await stream.finalMessage();
  assert.deepEqual(JSON.parse(message.tool_calls[0].function.arguments), { city: 'text' });
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

test('parse gives an object of the schema', async () => {
  const answer = await client.chat.completions.parse({ ...asked, response_format: zodResponseFormat(Plan, 'plan') });
  assert.deepEqual(answer.choices[0].message.parsed, plan);
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

test('an image goes to the strong model alone, as it is', async () => {
  const content = [
    { type: 'text', text: 'what is it?' },
    { type: 'image_url', image_url: { url: 'data:image/png;base64,iVBORw0KGgo=' } },
  ];
  await client.chat.completions.create({ model: 'pair', messages: [{ role: 'user', content }] });
  assert.deepEqual((await calls())[0].body.messages, [{ role: 'user', content }]);
  assert.equal((await calls(WEAK_URL)).length, 0);
});

test('the response gives its headers', async () => {
  const { response, request_id } = await client.chat.completions.create(asked).withResponse();
  assert.equal(response.headers.get('x-cowest-mode'), 'Pair');
  assert.equal(response.headers.get('x-request-id'), request_id);
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

test('models are listed and told by name', async () => {
  const { data } = await client.models.list();
  assert.deepEqual(data.map((model) => model.id), ['cowest']);
  assert.equal((await client.models.retrieve('cowest')).object, 'model');
  await assert.rejects(client.models.retrieve('gpt-9'), OpenAI.NotFoundError);
});

test('two hundred calls at once are all answered, each with its own', async () => {
  const answers = await Promise.all(
    Array.from({ length: 200 }, (_, n) => client.chat.completions.create({ ...asked, metadata: say(`answer ${n}`) })),
  );
  answers.forEach((answer, n) => assert.equal(answer.choices[0].message.content, `answer ${n}`));
});
