//! Sessions: the folder of a small one, with other bytes in the place of one of its files.
//!
//! The first byte says which file, the second whether all checksums are made right again: then what the bytes say is believed, and only what they
//! cannot mean is refused.

use std::cell::OnceCell;
use std::fs;
use std::path::{Path, PathBuf};

use landmark_inference::{About, CacheFlags, Opened, Reader, Room};
use landmark_memory::session::{Session, Settings, delete, peek, peek_tokens, repair};
use landmark_memory::{BlockType, Scoring};

use crate::models;
use crate::place::{self, put};

/// What decides the sizes of the session's files: heads of all layers, positions of a block, channels.
const HEADS: usize = 4;
const BLOCK: usize = 5;
const HEAD_DIM: usize = 4;
const UNIT: usize = (2 * BLOCK * HEAD_DIM * 4usize).next_multiple_of(64);
const RECORD: usize = 24 + 4 * HEADS * (1 + HEAD_DIM) + 4;
/// Of the file of a segment, and of a file of landmarks.
const HEADER: usize = 64;
const JOURNAL_HEADER: usize = 32;
const JOURNAL_RECORD: usize = 96;
/// What this session shares with its forks: the same in every process, so that what is found in one is found in others.
const LINEAGE: u64 = 0x1dea;
/// The session of a long text has an index: so many blocks of a token have one.
const LONG: usize = 2060;

struct World {
    opened: Opened,
    /// The small session.
    files: Vec<(String, Vec<u8>)>,
    /// The index of a long text's session, and the session.
    index: Vec<u8>,
    long: PathBuf,
}

fn with_world<T>(work: impl FnOnce(&World) -> T) -> T {
    thread_local! {
        static WORLD: OnceCell<World> = const { OnceCell::new() };
    }
    WORLD.with(|world| work(world.get_or_init(World::make)))
}

impl World {
    fn make() -> Self {
        let (model, sessions) = (place::folder("session-model"), place::folder("sessions"));
        models::write_gpt(&model);
        let opened = Opened::open(&models::flags(&model, None, None)).expect("a model that was just written");
        let of = |name: &str, mem_freq: usize, blocks: usize, tokens: usize| {
            let folder = sessions.join(name);
            let flags = CacheFlags { mem_cache_freq: Some(mem_freq), ..CacheFlags::default() };
            let about = About::new(&opened, &flags, false).expect("a model with landmarks");
            let settings = Settings { block_type: BlockType::F32, disk_limit: None, blocks_per_segment: Some(blocks) };
            about.create_of(&folder, &opened.model, settings).expect("a session can be made");
            let mut session = Session::open(&folder).expect("a session that was just made");
            let text: Vec<u32> = (0..tokens as u32).map(|i| (i * i * 7 + i / 5) % 250).collect();
            let mut reader = reader(&opened, &session).expect("a session that was just made can be read");
            for (i, chunk) in text.chunks(tokens.div_ceil(3)).enumerate() {
                reader.read(chunk, |_| true).expect("a text can be read");
                reader.commit(&mut session, chunk, Some(0), i == 2).expect("a text can be kept");
            }
            folder
        };
        let mut files = place::files(&of("small", BLOCK - 1, 3, 30));
        let long = of("long", 1, 4096, LONG);
        let index = fs::read(long.join("index")).expect("a long text has an index");
        files.retain(|(name, _)| name != "lock");
        // A file that a text of this length has not.
        files.push(("index".into(), b"LMINDEX\0".to_vec()));
        for (_, bytes) in files.iter_mut().filter(|(name, _)| name == "session.json") {
            let text = String::from_utf8(std::mem::take(bytes)).expect("JSON is text");
            let (begin, rest) = text.split_once("\"lineage\":\"").expect("a lineage");
            *bytes = format!("{begin}\"lineage\":\"{LINEAGE:016x}{}", &rest[16..]).into_bytes();
        }
        for (name, bytes) in &mut files {
            let at = if name == "journal" { 16 } else { 48 };
            if name == "journal" || name.starts_with("blocks") {
                bytes[at..at + 8].copy_from_slice(&LINEAGE.to_le_bytes());
            }
        }
        seal(&mut files);
        Self { opened, files, index, long }
    }
}

fn reader(opened: &Opened, session: &Session) -> anyhow::Result<Reader> {
    let about = About::of(session.about())?;
    let room = Room { ram: 1 << 16, gpu_memory: 0 };
    Reader::of_session(session, &about, opened.model.clone(), &opened.pretrained, room, Scoring::Index)
}

/// Makes the checksums right, as far as the files are long enough to have some.
fn seal(files: &mut [(String, Vec<u8>)]) {
    let of = |files: &[(String, Vec<u8>)], name: &str| {
        files.iter().find(|file| file.0 == name).map_or(Vec::new(), |file| file.1.clone())
    };
    let tokens = of(files, "tokens");
    let text_crc = |from: u64, length: u64| {
        let range = (|| {
            Some(
                usize::try_from(from.checked_mul(4)?).ok()?
                    ..usize::try_from(from.checked_add(length)?.checked_mul(4)?).ok()?,
            )
        })();
        range.and_then(|range| tokens.get(range)).map_or(0, crc32c::crc32c)
    };
    let long = |bytes: &[u8], at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"));
    let short = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let put = |bytes: &mut [u8], at: usize, x: u32| bytes[at..at + 4].copy_from_slice(&x.to_le_bytes());
    let close = |bytes: &mut [u8]| {
        if let Some((body, crc)) = bytes.split_last_chunk_mut::<4>() {
            *crc = crc32c::crc32c(body).to_le_bytes();
        }
    };
    for i in 0..files.len() {
        let (name, mut bytes) = (files[i].0.clone(), std::mem::take(&mut files[i].1));
        if name == "session.json" {
            let text = String::from_utf8_lossy(&bytes);
            let session = text.split_once(",\"session\":").and_then(|(_, rest)| rest.strip_suffix('}'));
            if let Some(session) = session {
                let crc = crc32c::crc32c(session.as_bytes());
                bytes = format!("{{\"checksum\":\"crc32c:{crc:08x}\",\"session\":{session}}}").into_bytes();
            }
        } else if name == "journal" && bytes.len() >= JOURNAL_HEADER {
            let (header, records) = bytes.split_at_mut(JOURNAL_HEADER);
            close(header);
            for record in records.chunks_exact_mut(JOURNAL_RECORD) {
                put(record, 24, text_crc(0, long(record, 16)));
                let tail = of(files, &format!("tail-{}", short(record, 28)));
                if tail.len() as u64 == long(record, 32) {
                    put(record, 40, crc32c::crc32c(&tail));
                }
                close(record);
            }
        } else if name.starts_with("blocks") && bytes.len() >= HEADER {
            let (header, records) = bytes.split_at_mut(HEADER);
            close(header);
            if let Some(segment) = name.strip_suffix(".idx") {
                let units = of(files, &format!("{segment}.seg"));
                let units = units.get(HEADER..).unwrap_or_default().chunks_exact(UNIT).map(crc32c::crc32c);
                let units: Vec<u32> = units.collect();
                for (record, units) in records.chunks_exact_mut(RECORD).zip(units.chunks_exact(HEADS)) {
                    put(record, 20, text_crc(long(record, 8), u64::from(short(record, 16))));
                    (0..).zip(units).for_each(|(head, &unit)| put(record, 24 + 4 * head, unit));
                    close(record);
                }
            }
        } else if name == "index" {
            close(&mut bytes);
        }
        files[i].1 = bytes;
    }
}

/// Opens a session and does with it what there is to do; whether it could be read.
fn use_session(world: &World, folder: &Path) -> anyhow::Result<()> {
    let status = peek(folder)?;
    let shown = peek_tokens(folder, status.tokens.saturating_sub(9)..status.tokens);
    let mut session = Session::open(folder)?;
    if session.notes().is_empty() {
        let last = session.tokens().len().saturating_sub(9);
        assert_eq!(shown.ok().as_deref(), session.tokens().get(last..));
    }
    let damage = session.verify();
    let blocks = session.blocks();
    let fork = folder.with_extension("fork");
    if fork.exists() {
        place::fill(&fork, &[]);
        fs::remove_dir(&fork)?;
    }
    if session.fork(&fork).is_ok() {
        assert_eq!(Session::open(&fork).map(|fork| fork.tokens().to_vec()).ok().as_deref(), Some(session.tokens()));
        delete(&fork)?;
    }
    let mut reader = reader(&world.opened, &session)?;
    if reader.has_blocks() && !session.tokens().is_empty() {
        reader.logits()?;
    }
    let more = [65, 66, 67, 68, 69, 70, 71];
    reader.read(&more, |_| true)?;
    reader.commit(&mut session, &more, None, true)?;
    let text = session.tokens().to_vec();
    drop((reader, session));
    // What was read with it is there, whatever it was before.
    let again = Session::open(folder)?;
    assert_eq!(again.tokens(), text);
    if damage.is_empty() {
        assert!(blocks.is_ok(), "nothing is damaged, and its blocks are not to be found");
        assert_eq!(again.verify(), [] as [String; 0]);
    }
    Ok(())
}

/// See the module.
pub fn run(bytes: &[u8]) -> bool {
    let Some((&[number, flags], bytes)) = bytes.split_first_chunk::<2>() else { return false };
    with_world(|world| {
        let folder = place::folder("sessions").join("changed");
        if flags & 2 == 2 {
            // An index of a long text. The session is as good without it.
            let mut files = [("index".to_string(), bytes.to_vec())];
            if flags & 1 == 1 {
                seal(&mut files);
            }
            put(&world.long.join("index"), &files[0].1);
            let session = Session::open(&world.long).expect("nothing but the index was changed");
            session.verify();
            let mut reader = reader(&world.opened, &session).expect("without its index a session is read");
            // An index that it could be, and is not, may be one that finds less.
            reader.read(&[65, 66, 67], |_| true).expect("without its index a session is read");
            return true;
        }
        let mut files = world.files.clone();
        match files.get_mut(usize::from(number)) {
            Some((_, whole)) => *whole = bytes.to_vec(),
            // One of them is missing.
            None => drop(files.remove(usize::from(number) % files.len())),
        }
        if flags & 1 == 1 {
            seal(&mut files);
        }
        place::fill(&folder, &files);
        let is_session = use_session(world, &folder).is_ok();
        if !is_session && repair(&folder).is_ok() {
            // It says what is left.
            let session = Session::open(&folder).expect("what was repaired can be opened");
            assert_eq!(session.verify(), [] as [String; 0], "what was repaired is whole");
            drop(session);
            let _ = use_session(world, &folder);
        }
        is_session
    })
}

pub fn seeds() -> Vec<Vec<u8>> {
    with_world(|world| {
        let files = (0u8..).zip(&world.files);
        let each = |flags: u8| files.clone().map(move |(number, (_, bytes))| [&[number, flags][..], bytes].concat());
        each(0)
            .chain(each(1))
            .chain([[&[0, 2][..], &world.index].concat(), [&[0, 3][..], &world.index].concat()])
            .collect()
    })
}
