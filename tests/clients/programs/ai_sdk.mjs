// Vercel's AI SDK with both of its providers: the OpenAI-compatible one, and OpenAI's over chat completions and, its
// default, over responses.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, streamText } from "ai";
import { z } from "zod";

const { URL: url, KEY, BASE } = process.env;
const compatible = createOpenAICompatible({
  name: "tunesmith", baseURL: `${url}/v1`, apiKey: KEY, supportsStructuredOutputs: true,
});
const openai = createOpenAI({ baseURL: `${url}/v1`, apiKey: KEY });
for (const model of [compatible(BASE), openai.chat(BASE), openai(BASE)]) {
  const settings = { model, temperature: 0, maxRetries: 0 };
  const first = await generateText({ ...settings, prompt: "Hello", maxOutputTokens: 8 });
  const messages = [{ role: "user", content: "Hello" }, ...first.response.messages, { role: "user", content: "Again?" }];
  await generateText({ ...settings, messages, maxOutputTokens: 8 });
  const stream = streamText({ ...settings, prompt: "Hello", maxOutputTokens: 8 });
  let text = "";
  for await (const piece of stream.textStream) text += piece;
  assert.equal(text, first.text);
  const { object } = await generateObject({
    ...settings, prompt: "Is it so?", schema: z.object({ yes: z.boolean() }), maxOutputTokens: 200,
  });
  assert.equal(typeof object.yes, "boolean");
}
