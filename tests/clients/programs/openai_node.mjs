// OpenAI's client for Node: history, streams, parsed answers, its loop of tools.
import assert from "node:assert/strict";
import OpenAI from "openai";
import { zodResponseFormat } from "openai/helpers/zod";
import { z } from "zod";

const { URL: url, KEY, BASE } = process.env;
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: KEY, maxRetries: 0 });
const asked = { model: BASE, max_tokens: 8, temperature: 0 };
const messages = [{ role: "user", content: "Hello" }];
const first = await client.chat.completions.create({ ...asked, messages });
const streamed = [];
for await (const piece of await client.chat.completions.create({ ...asked, messages, stream: true })) {
  streamed.push(piece.choices[0]?.delta?.content ?? "");
}
assert.equal(streamed.join(""), first.choices[0].message.content);
const history = [...messages, first.choices[0].message, { role: "user", content: "And again?" }];
assert.equal((await client.chat.completions.create({ ...asked, messages: history })).choices[0].message.role, "assistant");
const parsed = await client.chat.completions.parse({
  ...asked, messages, max_tokens: 200, response_format: zodResponseFormat(z.object({ yes: z.boolean() }), "answer"),
});
assert.equal(typeof parsed.choices[0].message.parsed.yes, "boolean");

const called = [];
const weather = {
  type: "function",
  function: {
    name: "weather",
    description: "The weather of a city.",
    parameters: {
      type: "object",
      properties: { city: { enum: ["Oslo", "Rome"] }, days: { enum: [1, 2] } },
      required: ["city", "days"],
    },
    parse: JSON.parse,
    function: (place) => { called.push(place); return "4 degrees"; },
  },
};
for (const stream of [false, true]) {
  called.length = 0;
  // The helper lets the model say something once it has called the function that it had to.
  const loop = client.chat.completions.runTools({
    ...asked, messages, max_tokens: 200, stream, tools: [weather], parallel_tool_calls: false,
    tool_choice: { type: "function", function: { name: "weather" } },
  });
  await loop.done();
  assert.equal(called.length, 1);
  assert.deepEqual(loop.messages.map((message) => message.role).slice(1, 3), ["assistant", "tool"]);
}
