// Numbers as people read them, and the few signs that the page has.

export const count = (n: number) => n.toLocaleString("en");
export const size = (bytes: number) =>
  bytes < 1e6 ? `${(bytes / 1e3).toFixed(0)} kB` : bytes < 1e9 ? `${(bytes / 1e6).toFixed(bytes < 1e7 ? 1 : 0)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
export const percent = (share: number) => (share > 0 && share < 0.01 ? "<1 %" : `${Math.round(100 * share)} %`);
export function time(seconds: number): string {
  if (seconds < 60) return `${Math.max(1, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

const SIGNS = {
  close: "M4 4l8 8M12 4l-8 8",
  back: "M10 3L5 8l5 5",
  remove: "M3 4.5h10M6.5 4.5V3h3v1.5M4.5 4.5l.6 8.5h5.8l.6-8.5",
  add: "M8 3v10M3 8h10",
  moon: "M13 9.6A5.4 5.4 0 0 1 6.4 3a5.4 5.4 0 1 0 6.6 6.6z",
  sun: "M8 5.2a2.8 2.8 0 1 0 0 5.6 2.8 2.8 0 0 0 0-5.6zM8 1v1.6M8 13.4V15M1 8h1.6M13.4 8H15M3 3l1.2 1.2M11.8 11.8L13 13M13 3l-1.2 1.2M4.2 11.8L3 13",
  key: "M9.6 6.4a3 3 0 1 1-1.2-1.2zM8.8 7.2L13 11.4V13h-1.6M10.6 9v1.6",
  up: "M8 13V3.5M4 7l4-4 4 4",
  stop: "M4.5 4.5h7v7h-7z",
};

export const Sign = ({ of }: { of: keyof typeof SIGNS }) => (
  <svg class="sign" viewBox="0 0 16 16" aria-hidden="true">
    <path d={SIGNS[of]} />
  </svg>
);
