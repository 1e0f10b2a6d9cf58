// The page: documents are dropped in and read, and asked about; every answer shows what was read for it.

import { render } from "preact";
import { useEffect, useRef, useState } from "preact/hooks";
import * as api from "./api";
import type { Model, ReadBlock, Session } from "./api";
import { Chat } from "./chat";
import { forget, job as keptJob } from "./kept";
import type { Job } from "./kept";
import { Map } from "./map";
import { Passage } from "./passage";
import type { Opened } from "./passage";
import { ACCEPTED, nameFor, read } from "./reading";
import type { Progress } from "./reading";
import { Sign, count, percent, size, time } from "./words";

const THEME = "landmark.theme";
const isDark = () => (localStorage.getItem(THEME) ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const chosenName = () => {
  try {
    return decodeURIComponent(location.hash.slice(1));
  } catch {
    return "";
  }
};

function Page() {
  const [model, setModel] = useState<Model | null>(null);
  const [sessions, setSessions] = useState<Session[] | null>(null);
  const [chosen, setChosen] = useState(chosenName);
  const [progress, setProgress] = useState<Progress | null>(null);
  const [waiting, setWaiting] = useState<string[]>([]);
  const [halves, setHalves] = useState<Job[]>([]);
  const [opened, setOpened] = useState<Opened | null>(null);
  const [trouble, setTrouble] = useState("");
  const [wantsKey, setWantsKey] = useState(false);
  const [isOver, setIsOver] = useState(false);
  const [said, say] = useState("");
  const [dark, setDark] = useState(isDark);
  const jobs = useRef<(() => Promise<void>)[]>([]);
  const isWorking = useRef(false);
  const stop = useRef<AbortController | null>(null);

  const failed = (error: unknown) => {
    if (error instanceof DOMException && error.name === "AbortError") return;
    if (error instanceof api.ApiError && error.status === 401) setWantsKey(true);
    else setTrouble(error instanceof TypeError ? "The server does not answer. Is it running?" : (error as Error).message);
  };
  const refresh = async (): Promise<Session[]> => {
    try {
      setModel(await api.model());
      const all = (await api.sessions()).sort((a, b) => a.name.localeCompare(b.name));
      setSessions(all);
      setWantsKey(false);
      const jobs = await Promise.all(all.map((session) => keptJob(session.name)));
      setHalves(jobs.filter((job) => job !== null));
      return all;
    } catch (error) {
      failed(error);
      return [];
    }
  };
  const choose = (name: string) => {
    setChosen(name);
    setOpened(null);
    if (chosenName() !== name) history.pushState(null, "", name ? `#${encodeURIComponent(name)}` : location.pathname);
  };
  const closePassage = () => {
    (opened?.from as HTMLElement | null)?.focus?.();
    setOpened(null);
  };

  useEffect(() => void refresh(), []);
  useEffect(() => {
    const go = () => (setChosen(chosenName()), setOpened(null));
    addEventListener("popstate", go);
    return () => removeEventListener("popstate", go);
  }, []);
  useEffect(() => {
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
  }, [dark]);
  useEffect(() => {
    const press = (event: KeyboardEvent) => {
      const inField = event.target instanceof HTMLTextAreaElement || event.target instanceof HTMLInputElement;
      if (event.key === "/" && !inField && !event.ctrlKey && !event.metaKey && !event.altKey) {
        const field = document.getElementById("question");
        if (field) (event.preventDefault(), field.focus());
      }
      if (event.key === "Escape" && opened) closePassage();
    };
    addEventListener("keydown", press);
    return () => removeEventListener("keydown", press);
  });

  /** One text is read after the other. */
  const work = async () => {
    if (isWorking.current) return;
    isWorking.current = true;
    for (let job = jobs.current.shift(); job; job = jobs.current.shift()) {
      setWaiting((names) => names.slice(1));
      stop.current = new AbortController();
      await job().catch(failed);
      setProgress(null);
      await refresh();
    }
    isWorking.current = false;
  };
  const add = (label: string, job: () => Promise<void>) => {
    jobs.current.push(job);
    setWaiting((names) => [...names, label]);
    void work();
  };
  const goOn = async (job: Job) => {
    const { signal } = stop.current!;
    choose(job.name);
    say(`Reading ${job.name}`);
    let told = 0;
    await read(job, signal, (progress) => {
      setProgress(progress);
      setSessions((all) => all && all.map((each) => (each.name === job.name ? { ...each, tokens: progress.tokens, blocks: progress.blocks, bytes: progress.disk } : each)));
      const quarter = Math.floor(4 * progress.share);
      if (quarter > told && quarter < 4) say(`${25 * quarter} % of ${job.name} is read`);
      told = Math.max(told, quarter);
    });
    say(`${job.name} is read`);
  };
  const take = (files: Iterable<File>) => {
    setTrouble("");
    for (const file of files) {
      add(file.name, async () => {
        const name = nameFor(file.name, (await api.sessions()).map((session) => session.name));
        await api.create(name);
        await refresh();
        try {
          await goOn({ name, file, place: { from: 0, tokens: 0 } });
        } catch (error) {
          // Of what cannot be read nothing stays.
          const isEmpty = await api.session(name).then((session) => session.tokens === 0 && !session.appending, () => false);
          if (isEmpty) {
            await api.remove(name).catch(() => undefined);
            await forget(name);
            choose("");
          }
          throw error;
        }
      });
    }
  };
  const drop = (event: DragEvent) => {
    event.preventDefault();
    setIsOver(false);
    take(event.dataTransfer?.files ?? []);
  };
  const remove = async (name: string) => {
    if (!confirm(`Remove ${name}, and all that was read of it?`)) return;
    if (progress?.name === name) stop.current?.abort();
    try {
      await api.remove(name);
      await forget(name);
      if (chosen === name) choose("");
    } catch (error) {
      failed(error);
    }
    await refresh();
  };

  const session = sessions?.find((session) => session.name === chosen) ?? null;
  const chooser = (
    <input type="file" multiple accept={ACCEPTED} onChange={(event) => {
      take([...(event.currentTarget.files ?? [])]);
      event.currentTarget.value = "";
    }} />
  );
  return (
    <div
      class={["page", session ? "has-text" : "", opened ? "has-passage" : "", isOver ? "over" : ""].join(" ")}
      onDragOver={(event) => (event.preventDefault(), setIsOver(true))}
      onDragLeave={(event) => event.relatedTarget === null && setIsOver(false)}
      onDrop={drop}
    >
      <div class="hidden" role="status" aria-live="polite">{said}</div>
      <nav class="side" aria-label="Texts">
        <header>
          <h1><img src="/icon.svg" alt="" width="20" height="20" /> Landmark</h1>
          <button type="button" class="plain" aria-label={dark ? "Light colours" : "Dark colours"} title={dark ? "Light colours" : "Dark colours"}
            onClick={() => (localStorage.setItem(THEME, dark ? "light" : "dark"), setDark(!dark))}>
            <Sign of={dark ? "sun" : "moon"} />
          </button>
        </header>
        <label class="button add"><Sign of="add" /> Read a text{chooser}</label>
        <ul>
          {sessions?.map((each) => (
            <li key={each.name} class={each.name === chosen ? "chosen" : ""}>
              <button type="button" aria-current={each.name === chosen ? "page" : undefined} data-session={each.name} onClick={() => choose(each.name)}>
                <span class="name">{each.name}</span>
                <small>
                  {each.error ?? (progress?.name === each.name
                    ? `reading, ${percent(progress.share)}`
                    : `${count(each.tokens)} tokens · ${size(each.bytes)}${halves.some((job) => job.name === each.name) ? " · in part" : ""}`)}
                </small>
              </button>
              <button type="button" class="plain remove" aria-label={`Remove ${each.name}`} title="Remove" onClick={() => void remove(each.name)}><Sign of="remove" /></button>
            </li>
          ))}
          {waiting.map((name, i) => <li key={i} class="waits"><span class="name">{name}</span><small>waits for its turn</small></li>)}
        </ul>
        {model && <footer class="faint" title="The model of this server">{model.id}</footer>}
      </nav>
      <main>
        {trouble && (
          <p class="trouble top" role="alert">
            <span>{trouble}</span>
            <button type="button" class="plain" aria-label="Close this message" onClick={() => setTrouble("")}><Sign of="close" /></button>
          </p>
        )}
        {wantsKey && <KeyForm done={() => void refresh()} />}
        {session && !session.error && (
          <>
            <header class="head">
              <button type="button" class="plain back" aria-label="All texts" onClick={() => choose("")}><Sign of="back" /></button>
              <h2>{session.name}</h2>
              <dl>
                <div><dt>tokens</dt><dd>{count(session.tokens)}</dd></div>
                <div><dt>blocks</dt><dd>{count(session.blocks)}</dd></div>
                <div><dt>on disk</dt><dd>{size(session.bytes)}</dd></div>
              </dl>
            </header>
            {progress?.name === session.name && <Reading progress={progress} stop={() => stop.current?.abort()} />}
            {progress?.name !== session.name && halves.filter((job) => job.name === session.name).map((job) => (
              <p class="notice" key={job.name}>
                <span>The reading of {job.file.name} was interrupted. What was read of it is there.</span>
                <button type="button" class="button" onClick={() => add(job.name, () => goOn(job))}>Go on reading</button>
              </p>
            ))}
            {session.tokens > 0 && (
              <Chat key={session.name} session={session} hasChat={model?.landmark.chat ?? false} opened={opened} say={say} failed={failed}
                open={(at: ReadBlock | number, of: ReadBlock[]) => setOpened((before) => ({ at, of, from: before?.from ?? document.activeElement }))} />
            )}
          </>
        )}
        {!session && sessions && !wantsKey && (
          <div class="welcome">
            <label class="drop">
              <span class="tiles" aria-hidden="true">{Array.from({ length: 48 }, (_, i) => <i key={i} class={[10, 29, 37].includes(i) ? "on" : ""} />)}</span>
              <strong>Drop in a long text</strong>
              <span>or choose a file: text, Markdown, HTML or PDF, of any length</span>
              {chooser}
            </label>
            <p class="faint">It is read once, block by block, and stays read: ask today or in a month. Every answer shows which blocks of it were read.</p>
          </div>
        )}
      </main>
      {opened && session && <Passage session={session} opened={opened} close={closePassage} open={(at) => setOpened({ ...opened, at })} />}
    </div>
  );
}

/** A text while it is read. */
function Reading({ progress, stop }: { progress: Progress; stop: () => void }) {
  const { share, tokens, blocks } = progress;
  // As many as there will be, if it goes on as it began.
  const [all, allTokens] = [Math.round(blocks / Math.max(share, 0.001)), Math.round(tokens / Math.max(share, 0.001))];
  const figures = [
    ["read", percent(share)],
    ["tokens/s", progress.tokensPerSecond > 0 ? count(Math.round(progress.tokensPerSecond)) : "…"],
    ["left", progress.secondsLeft === null ? "…" : time(progress.secondsLeft)],
    ["disk", size(progress.disk)],
    ["RAM", size(progress.ram)],
    ...(progress.gpu > 0 ? [["GPU", size(progress.gpu)]] : []),
  ];
  return (
    <section class="reading" aria-label={`Reading ${progress.name}`}>
      <Map blocks={Math.max(1, all)} tokens={allTokens} filled={share} label={`${percent(share)} is read`} />
      <div class="row">
        <dl>{figures.map(([term, figure]) => <div key={term}><dt>{term}</dt><dd>{figure}</dd></div>)}</dl>
        <button type="button" class="button" onClick={stop}>Stop</button>
      </div>
      <progress max={1} value={share} aria-label={`Reading ${progress.name}`} />
    </section>
  );
}

function KeyForm({ done }: { done: () => void }) {
  return (
    <form class="key" onSubmit={(event) => {
      event.preventDefault();
      api.key.set(String(new FormData(event.currentTarget).get("key") ?? "").trim());
      done();
    }}>
      <Sign of="key" />
      <label for="key">This server wants one of its keys.{api.key.get() && " The last one was not let in."}</label>
      <input id="key" name="key" type="password" autocomplete="off" required autofocus />
      <button class="button">Enter</button>
    </form>
  );
}

render(<Page />, document.getElementById("page")!);
