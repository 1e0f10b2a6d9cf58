// Questions to a session, and answers with a map each of what was read for them.

import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import type { Message, ReadBlock, Session } from "./api";
import { answers as kept, keepAnswers } from "./kept";
import type { Answer } from "./kept";
import { Map } from "./map";
import type { Opened } from "./passage";
import { Sign, count, percent } from "./words";

/** Blocks that are listed before somebody asks for more. */
const FEW = 4;
const OPTIONS = { continue: { tokens: 32, temperature: 0 }, chat: { tokens: 512, temperature: 0 } };

export function Chat({ session, hasChat, opened, open, say, failed }: {
  session: Session;
  /** Whether the model was made for conversations. */
  hasChat: boolean;
  opened: Opened | null;
  open: (at: ReadBlock | number, of: ReadBlock[]) => void;
  /** Tells it to those who listen. */
  say: (words: string) => void;
  failed: (error: unknown) => void;
}) {
  const [answers, setAnswers] = useState<Answer[]>(() => kept(session.name));
  const [mode, setMode] = useState<Answer["mode"]>(hasChat ? "chat" : "continue");
  const [isBusy, setIsBusy] = useState(false);
  const [isEmpty, setIsEmpty] = useState(true);
  const form = useRef<HTMLFormElement>(null);
  const field = useRef<HTMLTextAreaElement>(null);
  const end = useRef<HTMLDivElement>(null);
  const stop = useRef<AbortController | null>(null);
  useEffect(() => () => stop.current?.abort(), []);
  useEffect(() => end.current?.scrollIntoView({ block: "end" }), [answers.length]);

  const put = (answer: Answer, isDone = false) =>
    setAnswers((all) => {
      const next = [...all.filter((other) => other.id !== answer.id), { ...answer }].sort((a, b) => a.id - b.id);
      if (isDone) keepAnswers(session.name, next);
      return next;
    });

  const ask = async () => {
    const question = field.current?.value ?? "";
    if (!question.trim() || isBusy || !form.current) return;
    const options = new FormData(form.current);
    const answer: Answer = { id: Date.now(), mode, question, text: "", blocks: [] };
    const before = answers.filter((other) => other.mode === "chat" && !other.error);
    const turns = before.flatMap((other): Message[] => [{ role: "user", content: other.question }, { role: "assistant", content: other.text }]);
    const said = mode === "chat" ? { messages: [...turns, { role: "user" as const, content: question }] } : { prompt: question };
    const body = { session: session.name, max_tokens: Number(options.get("tokens")), temperature: Number(options.get("temperature")) };
    setIsBusy(true);
    put(answer);
    field.current!.value = "";
    setIsEmpty(true);
    stop.current = new AbortController();
    const begun = performance.now();
    try {
      for await (const part of api.ask(body, said, stop.current.signal)) {
        answer.text += part.text ?? "";
        answer.blocks = part.blocks ?? answer.blocks;
        answer.usage = part.usage ?? answer.usage;
        put(answer);
      }
      say(`Answer: ${answer.text.trim() || "nothing"}. ${answer.blocks.length} blocks are lit in the map.`);
    } catch (error) {
      const isStopped = error instanceof DOMException && error.name === "AbortError";
      answer.error = isStopped ? "Stopped." : (error as Error).message;
      if (error instanceof api.ApiError && error.status === 401) failed(error);
    }
    answer.seconds = (performance.now() - begun) / 1000;
    setIsBusy(false);
    put(answer, true);
    end.current?.scrollIntoView({ block: "end" });
  };

  return (
    <>
      <div class="answers">
        {answers.length === 0 && (
          <div class="invite">
            <h3>{hasChat ? "Ask about it" : "Go on from it"}</h3>
            <p>
              {hasChat
                ? "The whole text is there for every question; each answer shows the blocks of it that were read."
                : "This model goes on with text. Write how the sentence begins that you want to read the end of; the answer shows the blocks of the text that were read for it."}
            </p>
          </div>
        )}
        <ol>
          {answers.map((answer) => (
            <li key={answer.id} class="answer">
              <Shown answer={answer} session={session} isWritten={isBusy && answer === answers[answers.length - 1]}
                opened={opened} open={(at, of) => open(at, of)} />
            </li>
          ))}
        </ol>
        <div ref={end} />
      </div>
      <form class="composer" ref={form} onSubmit={(event) => (event.preventDefault(), void ask())}>
        <div class="box">
          <label class="hidden" for="question">{mode === "chat" ? "Your question" : "How the text goes on"}</label>
          <textarea id="question" ref={field} rows={2} placeholder={mode === "chat" ? "Ask about the text" : "What is the pass key? The pass key is"}
            onInput={(event) => setIsEmpty(!event.currentTarget.value.trim())}
            onKeyDown={(event) => event.key === "Enter" && !event.shiftKey && !event.isComposing && (event.preventDefault(), void ask())} />
          {isBusy
            ? <button type="button" class="go" onClick={() => stop.current?.abort()} aria-label="Stop"><Sign of="stop" /></button>
            : <button class="go" disabled={isEmpty} aria-label="Ask"><Sign of="up" /></button>}
        </div>
        <div class="options">
          {hasChat && (
            <fieldset class="modes">
              <legend class="hidden">How it is asked</legend>
              {(["chat", "continue"] as const).map((each) => (
                <label key={each}>
                  <input type="radio" name="mode" value={each} checked={mode === each} onChange={() => setMode(each)} />
                  <span>{each === "chat" ? "Chat" : "Continue"}</span>
                </label>
              ))}
            </fieldset>
          )}
          <label>Tokens <input key={`tokens ${mode}`} name="tokens" type="number" min="1" max="4096" defaultValue={String(OPTIONS[mode].tokens)} /></label>
          <label>Temperature <input key={`temperature ${mode}`} name="temperature" type="number" min="0" max="2" step="0.1" defaultValue={String(OPTIONS[mode].temperature)} /></label>
          <span class="keys"><kbd>/</kbd> to ask, <kbd>Enter</kbd> to send</span>
          {answers.length > 0 && !isBusy && (
            <button type="button" class="plain" onClick={() => (keepAnswers(session.name, []), setAnswers([]))}>Clear</button>
          )}
        </div>
      </form>
    </>
  );
}

function Shown({ answer, session, isWritten, opened, open }: {
  answer: Answer;
  session: Session;
  isWritten: boolean;
  opened: Opened | null;
  open: (at: ReadBlock | number, of: ReadBlock[]) => void;
}) {
  const [showsAll, showAll] = useState(false);
  // What stands in the question itself is not in the document.
  const blocks = answer.blocks.filter((block) => block.last_token < session.tokens).sort((a, b) => b.weight - a.weight);
  const openedBlock = opened && typeof opened.at !== "number" ? opened.at.block : null;
  const most = blocks[0]?.weight ?? 1;
  return (
    <>
      {answer.mode === "chat" && <p class="question">{answer.question}</p>}
      <p class="text">
        {answer.mode === "continue" && <span class="prompt">{answer.question}</span>}
        <span class="written">{answer.mode === "chat" ? answer.text.trimStart() : answer.text}</span>
        {isWritten && <span class="caret" aria-hidden="true" />}
      </p>
      {answer.error && <p class="trouble">{answer.error}</p>}
      {answer.usage && (
        <p class="faint">
          {count(answer.usage.completion_tokens)} tokens in {(answer.seconds ?? 0).toFixed(1)} s · {count(answer.usage.prompt_tokens_details.cached_tokens)} of{" "}
          {count(answer.usage.prompt_tokens)} tokens had been read before
        </p>
      )}
      {blocks.length > 0 && (
        <>
          <Map blocks={session.blocks} tokens={session.tokens} lit={blocks} opened={openedBlock} open={(at) => open(at, blocks)}
            label={`Map of the whole text: ${blocks.length} of ${count(session.blocks)} blocks are lit, which the answer read most. Arrow keys go from one to the next.`} />
          <ul class="reads">
            {blocks.slice(0, showsAll ? blocks.length : FEW).map((block) => (
              <li key={block.block}>
                <button type="button" data-block={block.block} aria-expanded={openedBlock === block.block} onClick={() => open(block, blocks)}>
                  <span class="weight">{percent(block.weight)}</span>
                  <span class="bar" aria-hidden="true"><span style={{ width: `${(100 * block.weight) / most}%` }} /></span>
                  <q>{block.text.trim().replace(/\s+/g, " ")}</q>
                </button>
              </li>
            ))}
          </ul>
          {blocks.length > FEW && (
            <button type="button" class="plain small" aria-expanded={showsAll} onClick={() => showAll(!showsAll)}>
              {showsAll ? "Show fewer" : `Show all ${blocks.length} blocks`}
            </button>
          )}
        </>
      )}
    </>
  );
}
