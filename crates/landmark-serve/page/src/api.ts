// What the page asks of the server.

/** A text that stays read. */
export interface Session {
  name: string;
  tokens: number;
  blocks: number;
  /** On disk. */
  bytes: number;
  block_dtype: string;
  unfinished_append: boolean;
  /** How far a text is that is being read into it. */
  appending: { read_tokens: number; tokens: number; ram_bytes: number; gpu_bytes: number } | null;
  /** Instead of all of this, if its files are damaged. */
  error?: string;
}

export interface Model {
  id: string;
  landmark: { chat: boolean; max_body: number };
}

/** A block that an answer read. Offsets are those of the session's text. */
export interface ReadBlock {
  block: number;
  /** Its share of the answer's attention. */
  weight: number;
  first_token: number;
  last_token: number;
  text: string;
}

export interface Usage {
  prompt_tokens: number;
  completion_tokens: number;
  prompt_tokens_details: { cached_tokens: number };
}

export interface Message {
  role: "user" | "assistant";
  content: string;
}

/** What the server says went wrong. */
export class ApiError extends Error {
  constructor(readonly status: number, readonly code: string, message: string) {
    super(message);
  }
}

const KEY = "landmark.api_key";

export const key = {
  get: () => localStorage.getItem(KEY) ?? "",
  set: (value: string) => (value ? localStorage.setItem(KEY, value) : localStorage.removeItem(KEY)),
};

/** How often, and after how many milliseconds, the page asks again when the server is full, or a request that was left is not gone yet. */
const AGAIN = { times: 30, pause: 1000 };

async function send(method: string, path: string, body: BodyInit | null, type: string | null, signal?: AbortSignal): Promise<Response> {
  const headers: Record<string, string> = {};
  if (key.get()) headers["Authorization"] = `Bearer ${key.get()}`;
  if (type) headers["Content-Type"] = type;
  for (let time = 0; ; time++) {
    const response = await fetch(path, { method, headers, body, signal: signal ?? null });
    if (response.ok) return response;
    const told = await response.json().catch(() => null);
    const isLeft = method === "DELETE" && told?.error?.code === "session_busy";
    if ((response.status === 429 || isLeft) && time < AGAIN.times) {
      await new Promise((go) => setTimeout(go, AGAIN.pause));
      signal?.throwIfAborted();
      continue;
    }
    throw new ApiError(response.status, told?.error?.code ?? "", told?.error?.message ?? `the server answered ${response.status}`);
  }
}

const get = async (path: string, signal?: AbortSignal) => (await send("GET", path, null, null, signal)).json();
const post = (path: string, body: unknown, signal?: AbortSignal) => send("POST", path, JSON.stringify(body), "application/json", signal);
const path = (name: string) => `/v1/sessions/${encodeURIComponent(name)}`;

export const model = async (): Promise<Model> => (await get("/v1/models")).data[0];
export const sessions = async (): Promise<Session[]> => (await get("/v1/sessions")).data;
export const session = (name: string, signal?: AbortSignal): Promise<Session> => get(path(name), signal);
export const create = async (name: string): Promise<Session> => (await post("/v1/sessions", { name, block_dtype: "int8" })).json();
export const remove = async (name: string): Promise<void> => void (await send("DELETE", path(name), null, null));
/** Reads a text, to its end. */
export const append = async (name: string, text: string, signal: AbortSignal): Promise<Session> =>
  (await post(`${path(name)}/append`, { text }, signal)).json();
/** Reads a file whole, whose text the server takes out of it. */
export const appendFile = async (name: string, file: File, type: string, signal: AbortSignal): Promise<Session> =>
  (await send("POST", `${path(name)}/append`, file, type, signal)).json();
/** The text of these tokens. */
export const text = async (name: string, first: number, end: number): Promise<string> =>
  (await get(`${path(name)}/text?first_token=${first}&end_token=${end}`)).text;

/** A part of an answer. */
export interface Part {
  text?: string;
  blocks?: ReadBlock[];
  usage?: Usage;
}

export interface Question {
  session: string;
  max_tokens: number;
  temperature: number;
}

/** Goes on with a session's text and a prompt, or answers in a conversation. */
export async function* ask(question: Question, said: { prompt: string } | { messages: Message[] }, signal: AbortSignal): AsyncGenerator<Part> {
  const route = "prompt" in said ? "/v1/completions" : "/v1/chat/completions";
  const response = await post(route, { ...question, ...said, stream: true, stream_options: { include_usage: true }, show_blocks: 16 }, signal);
  const reader = response.body!.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ; ) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop()!;
    for (const line of lines) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new ApiError(response.status, event.error.code, event.error.message);
      const choice = event.choices?.[0];
      yield { text: choice?.text ?? choice?.delta?.content, blocks: event.landmark?.blocks, usage: event.usage ?? undefined };
    }
  }
}
