// openai for Node: chat completions and responses.
import OpenAI from "openai";
import { AFTER_CALL, API, HI, MODEL, SCHEMA, TOO_LONG, TOOL, check, checkPerson, expect, run } from "./cells.mjs";

const client = new OpenAI({ baseURL: API, apiKey: "none", maxRetries: 0 });
const ask = (changes = {}) => client.chat.completions.create({ model: MODEL, messages: HI, temperature: 0, ...changes });
const text = async (changes = {}) => (await ask(changes)).choices[0].message.content;
const schema = { name: "person", schema: SCHEMA, strict: true };

await run({
  async chat() {
    check(await text(), "empty");
    const answer = await client.responses.create({ model: MODEL, input: HI[0].content, temperature: 0 });
    check(answer.output_text === (await text()), answer.output_text);
  },
  async stream() {
    let streamed = "";
    for await (const chunk of await ask({ stream: true })) streamed += chunk.choices[0]?.delta?.content ?? "";
    check(streamed === (await text()), streamed);
  },
  async tools() {
    check(!(await ask({ tools: [TOOL] })).choices[0].message.tool_calls, "a tool call");
    check((await ask({ messages: AFTER_CALL })).choices[0].finish_reason, "after a call");
    await expect(() => ask({ tools: [TOOL], tool_choice: "required" }), 400, "tool_choice");
  },
  async structured() {
    checkPerson(JSON.parse(await text({ response_format: { type: "json_schema", json_schema: schema } })));
  },
  async max_tokens() {
    check((await text({ max_tokens: 32000 })) === (await text()), "differs");
  },
  async errors() {
    await expect(() => ask({ model: "gpt-4o" }), 404, "gpt-4o");
    await expect(() => ask({ messages: [{ role: "user", content: TOO_LONG }] }), 400, "maximum context length");
  },
});
