// The text around a block, with the block marked.

import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import type { ReadBlock, Session } from "./api";
import { Sign, count, percent } from "./words";

/** Tokens that are shown before and after, and that more is asked for. */
const AROUND = 300;
const MORE = 800;

/** A block that an answer read, or a token that was pointed at; and the other blocks of that answer. */
export interface Opened {
  at: ReadBlock | number;
  of: ReadBlock[];
  /** What had the focus. */
  from: Element | null;
}

interface Shown {
  first: number;
  end: number;
  before: string;
  here: string;
  after: string;
}

export function Passage({ session, opened, open, close }: { session: Session; opened: Opened; open: (at: ReadBlock) => void; close: () => void }) {
  const { at, of } = opened;
  const [shown, show] = useState<Shown | null>(null);
  const [trouble, setTrouble] = useState("");
  const panel = useRef<HTMLElement>(null);
  const mark = useRef<HTMLElement>(null);
  const [first, end] = typeof at === "number" ? [at, at] : [at.first_token, Math.min(at.last_token + 1, session.tokens)];
  const text = (from: number, to: number) => (from < to ? api.text(session.name, from, to) : "");

  useEffect(() => {
    let isHere = true;
    setTrouble("");
    panel.current?.focus();
    const [from, to] = [Math.max(0, first - AROUND), Math.min(session.tokens, end + AROUND)];
    Promise.all([text(from, first), text(first, end), text(end, to)])
      .then(([before, here, after]) => isHere && show({ first: from, end: to, before: before!, here: here!, after: after! }))
      .catch((error: Error) => isHere && (show(null), setTrouble(error.message)));
    return () => void (isHere = false);
  }, [session.name, first, end]);
  useEffect(() => mark.current?.scrollIntoView({ block: "center" }), [shown?.here, first]);

  const more = async (isEarlier: boolean) => {
    if (!shown) return;
    try {
      if (isEarlier) {
        const from = Math.max(0, shown.first - MORE);
        show({ ...shown, first: from, before: (await text(from, shown.first)) + shown.before });
      } else {
        const to = Math.min(session.tokens, shown.end + MORE);
        show({ ...shown, end: to, after: shown.after + (await text(shown.end, to)) });
      }
    } catch (error) {
      setTrouble((error as Error).message);
    }
  };
  const inOrder = [...of].sort((a, b) => a.block - b.block);
  const place = typeof at === "number" ? -1 : inOrder.findIndex((block) => block.block === at.block);
  const step = (by: number) => open(inOrder[(place + by + inOrder.length) % inOrder.length]!);

  return (
    <aside class="passage" ref={panel} tabIndex={-1} aria-label="The text there">
      <header>
        <div>
          <h2>{typeof at === "number" ? `At ${percent(at / session.tokens)} of the text` : `Block ${count(at.block)}`}</h2>
          <p class="faint">
            {typeof at === "number"
              ? `token ${count(at)}`
              : `${percent(at.weight)} of the attention · ${percent(first / session.tokens)} into the text · tokens ${count(first)} to ${count(end - 1)}`}
          </p>
        </div>
        <button type="button" class="plain" onClick={close} aria-label="Close the text" title="Close (Esc)"><Sign of="close" /></button>
      </header>
      {place >= 0 && inOrder.length > 1 && (
        <nav class="steps" aria-label="Blocks that the answer read">
          <button type="button" onClick={() => step(-1)} aria-label="The one before">←</button>
          <span>{place + 1} of {inOrder.length} blocks</span>
          <button type="button" onClick={() => step(1)} aria-label="The next one">→</button>
        </nav>
      )}
      <div class="prose">
        {trouble && <p class="trouble" role="alert">{trouble}</p>}
        {!shown && !trouble && <p role="status">…</p>}
        {shown && (
          <>
            {shown.first > 0 && <button type="button" class="more" onClick={() => void more(true)}>Earlier text</button>}
            <p>{shown.before}{shown.here ? <mark ref={mark}>{shown.here}</mark> : <span class="point" ref={mark} />}{shown.after}</p>
            {shown.end < session.tokens && <button type="button" class="more" onClick={() => void more(false)}>Later text</button>}
          </>
        )}
      </div>
    </aside>
  );
}
