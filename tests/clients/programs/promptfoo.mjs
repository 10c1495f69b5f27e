// promptfoo evaluates a prompt against the server with its OpenAI chat provider.
import assert from "node:assert/strict";
import promptfoo from "promptfoo";

const { URL: url, KEY, BASE } = process.env;
const results = await promptfoo.evaluate(
  {
    prompts: ["Say {{word}}."],
    providers: [{ id: `openai:chat:${BASE}`, config: { apiBaseUrl: `${url}/v1`, apiKey: KEY, max_tokens: 8, temperature: 0 } }],
    tests: [{ vars: { word: "hello" }, assert: [{ type: "javascript", value: "typeof output === 'string'" }] }],
  },
  { cache: false, maxConcurrency: 1 },
);
const summary = await (results.toEvaluateSummary ? results.toEvaluateSummary() : results);
assert.equal(summary.stats.successes, 1, JSON.stringify(summary.results));
process.exit(0);
