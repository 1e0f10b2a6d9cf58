//! `landmark serve`: a model behind OpenAI's HTTP interface.

use anyhow::{Context, bail};
use landmark_inference::{CacheFlags, ModelFlags, Room, bytes};
use landmark_serve::{Keys, Limits, Settings, serve};
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

const EXAMPLES: &str = "\
Examples:
  landmark serve --checkpoint models/landmark-12m --sessions sessions
  landmark serve --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --adapter models/smollm2-135m-landmark --sessions sessions --device cuda
  curl http://127.0.0.1:8080/v1/completions -H 'Content-Type: application/json' -d '{\"prompt\": \"Anne was\", \"temperature\": 0}'

Ctrl-C, or SIGTERM, lets nobody in any more and waits for what is worked on; a second one does not wait.

Exit codes: 0 done, 1 error, 2 wrong command line.";

/// Flags of `landmark serve`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// What clients call the model. Left out: the last part of --checkpoint
    #[arg(long, value_name = "NAME", help_heading = "Model")]
    model_name: Option<String>,
    /// How a conversation is written (Jinja), for a model that does not say
    #[arg(long, value_name = "FILE", help_heading = "Model")]
    chat_template: Option<PathBuf>,
    /// The folder that sessions are in; it is made if it is missing
    #[arg(long, value_name = "DIR", help_heading = "Server")]
    sessions: PathBuf,
    /// The address to listen on; 0.0.0.0 is all of this machine's
    #[arg(long, value_name = "ADDRESS", default_value_t = IpAddr::V4(Ipv4Addr::LOCALHOST), help_heading = "Server")]
    host: IpAddr,
    /// The port; 0: one that is free
    #[arg(long, value_name = "N", default_value_t = 8080, help_heading = "Server")]
    port: u16,
    /// Lets in those alone who send one of these keys (one a line); each has sessions of its own
    #[arg(long, value_name = "FILE", help_heading = "Server")]
    api_key_file: Option<PathBuf>,
    /// RAM for blocks of a session that are in use, for each request that reads one
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "512MiB", help_heading = "Server")]
    ram: u64,
    /// The same of GPU memory, with --device cuda
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "2GiB", help_heading = "Server")]
    gpu_memory: u64,
    /// RAM (or GPU memory) for prompts that were read, to be gone on with; one that takes more is not kept, and with 0 none is
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "4GiB", help_heading = "Server")]
    kept_prompts: u64,
    /// The longest body of a request
    #[arg(long, value_name = "SIZE", value_parser = bytes, default_value = "8MiB", help_heading = "Limits")]
    max_body: u64,
    /// The most tokens of a prompt, or of a text that is appended at once
    #[arg(long, value_name = "N", default_value_t = 1_000_000, help_heading = "Limits")]
    max_prompt_tokens: usize,
    /// The most tokens that a request may ask for
    #[arg(long, value_name = "N", default_value_t = 4096, help_heading = "Limits")]
    max_new_tokens: usize,
    /// The longest time of a request, the waiting included
    #[arg(long, value_name = "SECONDS", default_value_t = 600, help_heading = "Limits")]
    max_seconds: u64,
    /// Requests that are worked on at once
    #[arg(long, value_name = "N", default_value_t = 8, help_heading = "Limits")]
    parallel: usize,
    /// Requests that wait; more are answered with status 429
    #[arg(long, value_name = "N", default_value_t = 64, help_heading = "Limits")]
    queue: usize,
    /// What a session that is made may take of the disk. Left out: what there is
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Limits")]
    session_disk: Option<u64>,
    /// What all sessions of a key may take of the disk; what a fork shares with another counts for both. Left out: what there is
    #[arg(long, value_name = "SIZE", value_parser = bytes, help_heading = "Limits")]
    key_disk: Option<u64>,
    /// Connections at once; more wait until one ends
    #[arg(long, value_name = "N", default_value_t = 1024, help_heading = "Limits")]
    connections: usize,
    /// How long requests may go on once the server is told to end
    #[arg(long, value_name = "SECONDS", default_value_t = 30, help_heading = "Limits")]
    grace_seconds: u64,
    #[command(flatten)]
    cache: CacheFlags,
}

/// Serves.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    for (flag, value) in [
        ("max_prompt_tokens", args.max_prompt_tokens),
        ("max_new_tokens", args.max_new_tokens),
        ("parallel", args.parallel),
        ("connections", args.connections),
    ] {
        if value == 0 {
            bail!("--{flag} 0: expected at least 1");
        }
    }
    // Beyond it the two together are no number of places.
    const MOST: usize = 1 << 20;
    if args.parallel > MOST || args.queue > MOST || args.connections > MOST {
        bail!("--parallel, --queue and --connections: expected at most {MOST}");
    }
    if args.cache.mem_cache_size.is_some() {
        bail!("--mem_cache_size is refused: nothing that a client sent is left out");
    }
    let name = match &args.model_name {
        Some(name) => name.clone(),
        None => {
            let last = args.model.checkpoint.file_name();
            let last = last.context("--checkpoint has no name: give one with --model_name")?;
            last.to_string_lossy().into_owned()
        }
    };
    let chat_template = match &args.chat_template {
        Some(path) => {
            Some(std::fs::read_to_string(path).with_context(|| format!("--chat_template {}", path.display()))?)
        }
        None => None,
    };
    let keys = match &args.api_key_file {
        Some(path) => Keys::read(path)?,
        None if !args.host.is_loopback() => {
            eprintln!("everybody who can reach {} is let in; --api_key_file changes that", args.host);
            Keys::none()
        }
        None => Keys::none(),
    };
    let limits = Limits {
        body: args.max_body,
        prompt_tokens: args.max_prompt_tokens,
        new_tokens: args.max_new_tokens,
        time: Duration::from_secs(args.max_seconds),
        parallel: args.parallel,
        queue: args.queue,
        kept: args.kept_prompts,
        session_disk: args.session_disk,
        key_disk: args.key_disk,
        connections: args.connections,
        grace: Duration::from_secs(args.grace_seconds),
    };
    let settings = Settings {
        model: args.model,
        cache: args.cache,
        name: name.clone(),
        chat_template,
        sessions: args.sessions,
        room: Room { ram: args.ram, gpu_memory: args.gpu_memory },
        host: args.host,
        port: args.port,
        keys,
        limits,
        converter: vec![
            std::env::current_exe().context("cannot tell where this program is")?.into(),
            "document".into(),
        ],
    };
    serve(settings, |address| {
        // Whoever started it may not read this.
        let _ = writeln!(std::io::stdout(), "{name} is served at http://{address}/v1");
    })?;
    Ok(ExitCode::SUCCESS)
}
