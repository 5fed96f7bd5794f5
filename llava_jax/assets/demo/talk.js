// A conversation with the server: what was said, and one answer at a time as it comes.
// Talks only to the server that the page is from, by OpenAI's API.

const SLOT = "llava_jax key";

// The key comes behind # in the link, which browsers send to nobody; it stays in this tab.
export function takeKey() {
  const given = new URLSearchParams(location.hash.slice(1)).get("key");
  if (given) {
    sessionStorage.setItem(SLOT, given);
    history.replaceState(null, "", location.pathname);
  }
  return sessionStorage.getItem(SLOT);
}

export const setKey = (key) => sessionStorage.setItem(SLOT, key.trim());

export class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

export async function call(path, body, signal) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem(SLOT) ?? ""}` };
  const how = { headers, signal };
  if (body) Object.assign(how, { method: "POST", body: JSON.stringify(body) });
  if (body) headers["Content-Type"] = "application/json";
  let reply;
  try {
    reply = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The server does not answer. Is it still running?");
  }
  if (reply.ok) return reply;
  const told = await reply.json().catch(() => null);
  throw new Refused(reply.status, told?.error?.message ?? `The server refused (${reply.status}).`);
}

// The data of server-sent events, parsed, until [DONE].
async function* events(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Refused(0, "The connection ended before the answer did.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
    }
  }
}

// turns: [{role: "user", text, pictures: [{url, name}]} | {role: "assistant", text, ...numbers}]
export class Talk {
  turns = [];
  running = null; // the AbortController of the answer that is coming

  // In OpenAI's form, up to a turn (all without it). A question without an answer is left out.
  messages(system, end = this.turns.length) {
    const rows = system.trim() ? [{ role: "system", content: system.trim() }] : [];
    for (let i = 0; i < end; i++) {
      const turn = this.turns[i], next = this.turns[i + 1];
      if (turn.role === "assistant" ? !turn.text : i + 1 < end && !next?.text) continue;
      const shown = (turn.pictures ?? []).map((p) => ({ type: "image_url", image_url: { url: p.url } }));
      const said = turn.text ? [{ type: "text", text: turn.text }] : [];
      rows.push({ role: turn.role, content: shown.length ? [...shown, ...said] : turn.text });
    }
    return rows;
  }

  // Asks for the answer to the last turn, and tells `changed` whenever more of it is there.
  async answer({ model, system, temperature, length }, changed) {
    const asked = { model, messages: this.messages(system), temperature, max_tokens: length,
      stream: true, stream_options: { include_usage: true } };
    const turn = { role: "assistant", text: "", running: true, temperature, model };
    this.turns.push(turn);
    const start = performance.now();
    this.running = new AbortController();
    changed(turn);
    try {
      const reply = await call("/v1/chat/completions", asked, this.running.signal);
      for await (const piece of events(reply)) {
        if (piece.error) throw new Refused(500, piece.error.message);
        const choice = piece.choices[0];
        turn.text += choice?.delta?.content ?? "";
        turn.reason = choice?.finish_reason ?? turn.reason;
        if (turn.text) turn.first ??= performance.now() - start;
        if (piece.usage) turn.usage = piece.usage;
        turn.seconds = (performance.now() - start) / 1000;
        changed(turn);
      }
    } catch (error) {
      turn.reason = error.name === "AbortError" ? "stopped" : "error";
      if (turn.reason === "error") turn.problem = error instanceof Refused ? error.message : "The answer could not be read.";
      turn.status = error.status;
    } finally {
      turn.running = false;
      this.running = null;
      changed(turn);
    }
  }

  stop() { this.running?.abort(); }
}

export function asJson(talk, { model, system, temperature, length }) {
  const keep = ({ text, reason, usage, first, seconds, temperature }) =>
    ({ text, finish_reason: reason, usage, first_token_ms: first && Math.round(first), seconds, temperature });
  const answers = talk.turns.filter((t) => t.role === "assistant").map(keep);
  return JSON.stringify({ model, temperature, max_tokens: length, messages: talk.messages(system), answers }, null, 1);
}

export function asMarkdown(talk, { model, system }) {
  const parts = [`# A conversation with ${model}`];
  if (system.trim()) parts.push(`**System:** ${system.trim()}`);
  for (const turn of talk.turns) {
    const shown = (turn.pictures ?? []).map((p, i) => `![picture ${i + 1}](${p.url})`);
    parts.push(turn.role === "user" ? "## You" : "## Model", ...shown, turn.text || "*(no answer)*");
  }
  return `${parts.join("\n\n")}\n`;
}
