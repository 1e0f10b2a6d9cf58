// What the page keeps in the browser: files that are not read to their end, and answers.

import type { ReadBlock, Usage } from "./api";

/** A file on its way into a session. */
export interface Job {
  name: string;
  file: File;
  place: Place;
}

/** How much of a file the session has for sure. */
export interface Place {
  /** In characters; of one that goes to the server as a whole, 0 or 1. */
  from: number;
  /** The session's tokens then. */
  tokens: number;
}

export interface Answer {
  id: number;
  mode: "continue" | "chat";
  question: string;
  text: string;
  blocks: ReadBlock[];
  usage?: Usage;
  seconds?: number;
  error?: string;
}

/** Answers of a session that are kept. */
const ANSWERS = 30;
const places = "landmark.readings";
const answersOf = (name: string) => `landmark.answers.${name}`;

function stored<T>(key: string, none: T): T {
  try {
    return JSON.parse(localStorage.getItem(key) ?? "null") ?? none;
  } catch {
    return none;
  }
}

function store(key: string, value: unknown) {
  try {
    localStorage.setItem(key, JSON.stringify(value));
  } catch {
    // The browser has no room, or keeps nothing: then it is there until the page is left.
  }
}

export const answers = (name: string): Answer[] => stored(answersOf(name), []);
export const keepAnswers = (name: string, all: Answer[]) => store(answersOf(name), all.slice(-ANSWERS));

function database(): Promise<IDBDatabase> {
  return new Promise((done, fail) => {
    const opening = indexedDB.open("landmark", 1);
    opening.onupgradeneeded = () => void opening.result.createObjectStore("files");
    opening.onsuccess = () => done(opening.result);
    opening.onerror = () => fail(opening.error);
  });
}

async function files<T>(mode: IDBTransactionMode, work: (files: IDBObjectStore) => IDBRequest<T>): Promise<T> {
  const open = await database();
  try {
    return await new Promise<T>((done, fail) => {
      const transaction = open.transaction("files", mode);
      const request = work(transaction.objectStore("files"));
      transaction.oncomplete = () => done(request.result);
      transaction.onabort = transaction.onerror = () => fail(transaction.error);
    });
  } finally {
    open.close();
  }
}

/** Keeps a file until it is read; if the browser does not, an interrupted reading cannot be gone on with, and that is all. */
export async function keepJob(job: Job): Promise<void> {
  await files("readwrite", (files) => files.put(job.file, job.name)).catch(() => undefined);
  keepPlace(job.name, job.place);
}

export const keepPlace = (name: string, place: Place) => store(places, { ...stored(places, {}), [name]: place });

export async function forgetJob(name: string): Promise<void> {
  const rest: Record<string, Place> = stored(places, {});
  delete rest[name];
  store(places, rest);
  await files("readwrite", (files) => files.delete(name)).catch(() => undefined);
}

/** The file of a reading that came to no end. */
export async function job(name: string): Promise<Job | null> {
  const place = stored<Record<string, Place>>(places, {})[name];
  if (!place) return null;
  const file = await files<unknown>("readonly", (files) => files.get(name)).catch(() => undefined);
  return file instanceof File ? { name, file, place } : null;
}

export async function forget(name: string): Promise<void> {
  localStorage.removeItem(answersOf(name));
  await forgetJob(name);
}
