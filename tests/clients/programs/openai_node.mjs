// OpenAI's client for Node: history, streams, parsed answers.
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
