//! `landmark chat`: a conversation, about a text of any length if there is one.

use crate::interrupt;
use crate::reading::ReadingBar;
use crate::text_pieces::TextPieces;
use anyhow::{Context, bail};
use landmark_data::Pretrained;
use landmark_inference::{CacheFlags, Message, ModelFlags, Reader, Role, Sampler, SamplingFlags, Template};
use std::io::{BufRead, ErrorKind, IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;

const EXAMPLES: &str = "\
Examples:
  landmark chat --checkpoint SmolLM2-135M-Instruct.Q4_1.gguf
  landmark chat --checkpoint HuggingFaceTB/SmolLM2-135M-Instruct --system 'You answer in one sentence.'
  echo 'Who is Anne?' | landmark chat --checkpoint models/mine --file assets/persuasion.txt.zst --temperature 0

Each line of standard input is a message, and each reply goes to standard output as it is drawn.
Without flags of sampling, tokens are drawn as the model's generation_config.json says, and where it says nothing as llama.cpp
does: temperature 0.8, the likeliest 40 tokens, of these 95 % of the probability.
Ctrl-C stops a reply and keeps the conversation; at the prompt it ends it, as the end of the input does.

Exit codes: 0 done, 1 error, 2 wrong command line, 130 Ctrl-C.";

/// Flags of `landmark chat`.
#[derive(clap::Args)]
#[command(rename_all = "snake_case", after_help = EXAMPLES)]
pub struct Args {
    #[command(flatten)]
    model: ModelFlags,
    /// What the model is told before the conversation. Left out: as its chat template has it
    #[arg(long, value_name = "TEXT", help_heading = "Conversation")]
    system: Option<String>,
    /// A text of any length that the conversation is about: it comes before the first message
    #[arg(long, value_name = "FILE", help_heading = "Conversation")]
    file: Option<PathBuf>,
    /// Stop a reply after so many tokens
    #[arg(long, value_name = "N", default_value_t = 1000, help_heading = "Conversation")]
    max_new_tokens: usize,
    /// How a conversation is written (Jinja), for a model that does not say
    #[arg(long, value_name = "FILE", help_heading = "Conversation")]
    chat_template: Option<PathBuf>,
    #[command(flatten)]
    sampling: SamplingFlags,
    #[command(flatten)]
    cache: CacheFlags,
}

/// Talks.
pub fn run(args: Args) -> anyhow::Result<ExitCode> {
    args.sampling.check()?;
    let (path, adapter) = (landmark_inference::checkpoint(&args.model.checkpoint)?, args.model.adapter.as_deref());
    let pretrained = landmark_inference::pretrained(&path, adapter, args.model.tokenizer.as_deref())?;
    let mut sampler = Sampler::new(&args.sampling, pretrained.sampling)?;
    let template = template(&args, &pretrained)?;
    let file = match &args.file {
        Some(path) => Some(TextPieces::open(path)?.rest().with_context(|| format!("--file {}", path.display()))?),
        None => None,
    };
    let model = landmark_inference::load(&path, adapter, args.model.device)?;
    let reader = Reader::of_pretrained(model, &pretrained, &args.cache)?;
    let mut conversation = Conversation { reader, pretrained, template, messages: Vec::new(), read: String::new() };
    if let Some(text) = args.system {
        conversation.say(Role::System, text)?;
    }
    interrupt::watch()?;
    let is_terminal = std::io::stdin().is_terminal();
    let mut before = file.map_or(String::new(), |text| text + "\n\n");
    loop {
        let Some(line) = next_message(is_terminal)? else { break };
        if line.trim().is_empty() {
            continue;
        }
        conversation.say(Role::User, std::mem::take(&mut before) + line.trim())?;
        match conversation.reply(&mut sampler, args.max_new_tokens) {
            // Whoever reads the replies has read enough, as `head` does.
            Err(error) if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == ErrorKind::BrokenPipe) => {
                return Ok(ExitCode::SUCCESS);
            }
            other => other?,
        }
        if interrupt::requested() && !is_terminal {
            return Ok(ExitCode::from(interrupt::EXIT_CODE));
        }
        interrupt::clear();
    }
    Ok(ExitCode::SUCCESS)
}

fn template(args: &Args, pretrained: &Pretrained) -> anyhow::Result<Template> {
    let source = match (&args.chat_template, &pretrained.chat_template) {
        (Some(path), _) => {
            std::fs::read_to_string(path).with_context(|| format!("--chat_template {}", path.display()))?
        }
        (None, Some(source)) => source.clone(),
        (None, None) => bail!(
            "the model has no chat template, so it was not made for conversations: use landmark generate, or name one with \
             --chat_template FILE"
        ),
    };
    Template::new(source, pretrained.bos_token.clone(), pretrained.eos_token.clone())
}

/// The next line of the input; at a prompt if somebody types it.
fn next_message(is_terminal: bool) -> anyhow::Result<Option<String>> {
    if is_terminal {
        eprint!("> ");
    }
    let mut line = String::new();
    // There is nothing to stop but the conversation.
    interrupt::stop_at_once(true);
    let read = std::io::stdin().lock().read_line(&mut line).context("standard input");
    interrupt::stop_at_once(false);
    Ok((read? > 0).then_some(line))
}

/// What was said, and what of it the model has read.
struct Conversation {
    reader: Reader,
    pretrained: Pretrained,
    template: Template,
    messages: Vec<Message>,
    read: String,
}

impl Conversation {
    /// Adds a message. The template's marks cannot be said.
    fn say(&mut self, role: Role, content: String) -> anyhow::Result<()> {
        let tokenizer = &self.pretrained.tokenizer;
        if tokenizer.encode(&content)? != tokenizer.encode_with_special(&content)? {
            bail!("the text spells out one of the model's own marks, such as {:?}", self.mark());
        }
        self.messages.push(Message { role, content });
        Ok(())
    }

    fn mark(&self) -> &str {
        self.pretrained.eos_token.as_deref().unwrap_or("<landmark>")
    }

    /// Reads what is new, and answers.
    fn reply(&mut self, sampler: &mut Sampler, max_tokens: usize) -> anyhow::Result<()> {
        let whole = self.template.render(&self.messages)?;
        // A template may write earlier messages anew, without their thoughts.
        let new = match whole.strip_prefix(&self.read) {
            Some(new) => new,
            None => {
                self.reader.clear();
                whole.as_str()
            }
        };
        let tokens = self.pretrained.tokenizer.encode_with_special(new)?;
        let mut bar = ReadingBar::new("reading", Some(tokens.len() as u64));
        self.reader.read(&tokens, |read| {
            bar.set(read as u64, read);
            !interrupt::requested()
        })?;
        bar.finish();
        if interrupt::requested() {
            // Half a message cannot be gone on with.
            self.reader.clear();
            self.read.clear();
            self.messages.pop();
            eprintln!("(stopped while reading; the message is forgotten)");
            return Ok(());
        }
        self.read = whole;

        let mut out = std::io::stdout().lock();
        let tokenizer = self.pretrained.tokenizer.clone();
        let (mut decoder, mut text) = (tokenizer.decoder(), String::new());
        self.reader.generate(max_tokens, sampler, |token| {
            let piece = decoder.push(token)?;
            out.write_all(piece.as_bytes())?;
            out.flush()?;
            text += &piece;
            Ok(!interrupt::requested())
        })?;
        let rest = decoder.finish()?;
        writeln!(out, "{rest}")?;
        text += &rest;
        self.read += &text;
        self.messages.push(Message { role: Role::Assistant, content: text });
        Ok(())
    }
}
