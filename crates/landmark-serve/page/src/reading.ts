// A document on its way into a session.

import * as api from "./api";
import { forgetJob, keepJob, keepPlace } from "./kept";
import type { Job } from "./kept";

/** How far a document was read. */
export interface Progress {
  name: string;
  /** Of 1. */
  share: number;
  tokens: number;
  /** Since the reading was begun, or gone on with. */
  tokensPerSecond: number;
  secondsLeft: number | null;
  blocks: number;
  disk: number;
  ram: number;
  gpu: number;
}

/** Characters of a request: many chunks, so that little is spent on beginning, and soon enough done that no server's time is up. */
const PIECE = 200_000;
/** Milliseconds from one look at how far it is to the next. */
const LOOK = 300;

/** What a file may be. */
export const ACCEPTED = ".txt,.text,.md,.markdown,.log,.csv,.json,.html,.htm,.pdf,text/plain,text/markdown,text/html,application/pdf";

/** The type of a file that goes to the server as it is; others are texts, and go there in pieces. */
const wholeType = (file: File) => (/\.pdf$/i.test(file.name) ? "application/pdf" : /\.html?$/i.test(file.name) ? "text/html" : null);

/** Where a piece ends: after a line, a sentence or a word, so that no word is cut. */
function pieceEnd(text: string, from: number): number {
  const to = Math.min(from + PIECE, text.length);
  if (to === text.length) return to;
  for (const mark of ["\n", ". ", " "]) {
    const at = text.lastIndexOf(mark, to - 1);
    if (at > from + PIECE / 2) return at + mark.length;
  }
  // Between the halves of a character there is no place.
  const code = text.charCodeAt(to - 1);
  return code >= 0xd800 && code < 0xdc00 ? to + 1 : to;
}

/** A name for the session of a file, that no other session has. */
export function nameFor(file: string, taken: string[]): string {
  const plain = file.replace(/\.[^.]*$/, "").normalize("NFKD").replace(/[^A-Za-z0-9._-]+/g, "-").replace(/^[-._]+|[-._]+$/g, "");
  const stem = plain.slice(0, 48) || "text";
  let name = stem;
  for (let i = 2; taken.includes(name); i++) name = `${stem}-${i}`;
  return name;
}

/** The text of a file. */
async function textOf(file: File): Promise<string> {
  const bytes = new Uint8Array(await file.arrayBuffer());
  try {
    const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
    if (!text.includes("\0")) return text;
  } catch {
    // Told below.
  }
  throw new Error(`${file.name} is not a text in UTF-8`);
}

/** Reads a file into its session, from where it is, and tells how far it came. */
export async function read(job: Job, signal: AbortSignal, tell: (progress: Progress) => void): Promise<void> {
  const type = wholeType(job.file);
  const text = type ? "" : await textOf(job.file);
  if (!type && !text.trim()) throw new Error(`${job.file.name} is empty`);
  await keepJob(job);
  let before = await api.session(job.name, signal);
  while (before.appending) {
    // A request that was left is not gone yet.
    await new Promise((go) => setTimeout(go, LOOK));
    before = await api.session(job.name, signal);
  }
  // What was asked for last may have come to its end when nobody was there any more to be told.
  const isDone = !before.unfinished_append && before.tokens > job.place.tokens;
  // A file that goes as a whole is one piece, whose length nobody has to know.
  const length = type ? 1 : text.length;
  const endOf = (from: number) => (type ? 1 : pieceEnd(text, from));
  const first = isDone ? endOf(job.place.from) : job.place.from;
  const begun = performance.now();
  let [ram, gpu] = [0, 0];
  const look = (session: api.Session, from: number, to: number) => {
    const { appending } = session;
    const share = (from + (appending ? appending.read_tokens / Math.max(1, appending.tokens) : 0) * (to - from)) / length;
    const seconds = (performance.now() - begun) / 1000;
    const gained = share - first / length;
    // Between two pieces nothing is in use; what the last one had tells more.
    if (appending) [ram, gpu] = [appending.ram_bytes, appending.gpu_bytes];
    tell({
      name: job.name,
      share,
      tokens: session.tokens,
      tokensPerSecond: seconds > 0 ? (session.tokens - before.tokens) / seconds : 0,
      secondsLeft: gained > 0.002 ? (seconds * (1 - share)) / gained : null,
      blocks: session.blocks,
      disk: session.bytes,
      ram,
      gpu,
    });
  };
  for (let from = first; from < length; ) {
    const [begin, end] = [from, endOf(from)];
    const looking = setInterval(() => {
      // What it does not see now it sees at the next look.
      api.session(job.name, signal).then((session) => session.appending && look(session, begin, end), () => undefined);
    }, LOOK);
    let session: api.Session;
    try {
      session = type ? await api.appendFile(job.name, job.file, type, signal) : await api.append(job.name, text.slice(begin, end), signal);
      look(session, end, end);
    } finally {
      clearInterval(looking);
    }
    from = end;
    keepPlace(job.name, { from, tokens: session.tokens });
  }
  await forgetJob(job.name);
}
