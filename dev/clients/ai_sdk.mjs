// Vercel's AI SDK: its default provider, which calls /v1/responses, and openai-compatible, which calls chat completions.
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { generateObject, generateText, jsonSchema, streamText, tool } from "ai";
import { API, MODEL, SCHEMA, TOO_LONG, check, checkPerson, expect, run } from "./cells.mjs";

const options = { baseURL: API, apiKey: "none" };
const compatible = createOpenAICompatible({ name: "nanochat", supportsStructuredOutputs: true, ...options });
const models = [createOpenAI(options)(MODEL), createOpenAI(options).chat(MODEL), compatible(MODEL)];
const request = (model, changes = {}) => ({ model, prompt: "What is 12 + 30?", temperature: 0, maxRetries: 0, ...changes });
const each = async (work) => {
  for (const model of models) await work(model);
};
const add = tool({ description: "Adds", inputSchema: jsonSchema({ type: "object", properties: { a: { type: "number" } } }) });

await run({
  chat: () => each(async (model) => {
    const answer = await generateText(request(model, { system: "Be short." }));
    check(answer.text && answer.usage.outputTokens, answer);
  }),
  stream: () => each(async (model) => {
    let streamed = "";
    for await (const piece of streamText(request(model)).textStream) streamed += piece;
    check(streamed === (await generateText(request(model))).text, streamed);
  }),
  tools: () => each(async (model) => {
    check((await generateText(request(model, { tools: { add } }))).toolCalls.length === 0, "a tool call");
    await expect(() => generateText(request(model, { tools: { add }, toolChoice: "required" })), 400, "tool_choice");
  }),
  structured: () => each(async (model) => {
    checkPerson((await generateObject(request(model, { schema: jsonSchema(SCHEMA) }))).object);
  }),
  max_tokens: () => each(async (model) => {
    check((await generateText(request(model, { maxOutputTokens: 32000 }))).text, "empty");
  }),
  errors: () => each(async (model) => {
    await expect(() => generateText(request(model, { prompt: TOO_LONG })), 400, "maximum context length");
  }),
});
