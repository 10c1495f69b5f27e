// Vercel's AI SDK with both of its providers: the OpenAI-compatible one, and OpenAI's over chat completions and, its
// default, over responses. Tools over chat completions.
import assert from "node:assert/strict";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, stepCountIs, streamText, tool } from "ai";
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

const weather = tool({
  description: "The weather of a city.",
  inputSchema: z.object({ city: z.enum(["Oslo", "Rome"]), days: z.union([z.literal(1), z.literal(2)]) }),
  execute: async ({ city, days }) => `${days} degrees in ${city}`,
});
for (const model of [compatible(BASE), openai.chat(BASE), openai(BASE)]) {
  const settings = {
    model, temperature: 0, maxRetries: 0, maxOutputTokens: 200, tools: { weather }, stopWhen: stepCountIs(2),
    providerOptions: { openai: { parallelToolCalls: false }, tunesmith: { parallel_tool_calls: false } },
    // It must call first; after that it may say something.
    prepareStep: ({ stepNumber }) => ({ toolChoice: stepNumber === 0 ? "required" : "auto" }),
  };
  const whole = await generateText({ ...settings, prompt: "How is it?" });
  const [first, second] = whole.steps;
  assert.equal(first.finishReason, "tool-calls");
  assert.deepEqual(first.toolCalls.map((call) => [call.toolName, call.invalid]), [["weather", undefined]]);
  assert.equal(first.toolResults.length, first.toolCalls.length);
  assert.ok(second.usage.inputTokens > first.usage.inputTokens);
  const stream = streamText({ ...settings, prompt: "How is it?" });
  await stream.consumeStream();
  const [streamed] = await stream.steps;
  assert.deepEqual(streamed.toolCalls.map((call) => call.input), first.toolCalls.map((call) => call.input));
  const messages = [{ role: "user", content: "How is it?" }, ...whole.response.messages, { role: "user", content: "And?" }];
  const named = await generateText({
    ...settings, messages, prepareStep: undefined, stopWhen: stepCountIs(1), toolChoice: { type: "tool", toolName: "weather" },
  });
  assert.equal(named.toolCalls.length, 1);
}
