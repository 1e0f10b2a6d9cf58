//! Chat templates: how a model's training data wrote a conversation, as Jinja in the way of `transformers`.

use anyhow::Context;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, Error, ErrorKind, Value, context};

/// Who speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Who sets the rules.
    System,
    /// Who asks.
    User,
    /// The model.
    Assistant,
}

/// What somebody says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who.
    pub role: Role,
    /// What.
    pub content: String,
}

/// A template.
pub struct Template {
    environment: Environment<'static>,
    bos_token: Option<String>,
    eos_token: Option<String>,
}

const NAME: &str = "chat_template";
/// What a template may do, in steps, or in 64 bytes that it writes: this, and as much for each byte that was said. A template comes with a model, from
/// whoever made it; those of models take a few dozen steps a message.
const FUEL: u64 = 1 << 20;

impl Template {
    /// From its source, and how the model spells the beginning and the end of a text.
    pub fn new(source: String, bos_token: Option<String>, eos_token: Option<String>) -> anyhow::Result<Self> {
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.context("the syntax of chat templates")?);
        // Templates are written for Python's strings and dictionaries.
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| -> Result<String, Error> {
            Err(Error::new(ErrorKind::InvalidOperation, message))
        });
        environment.add_template_owned(NAME, source).context("the model's chat template")?;
        Ok(Self { environment, bos_token, eos_token })
    }

    /// The conversation as the model reads it, up to where its reply begins.
    ///
    /// # Errors
    /// The template refuses the conversation, or comes to no end.
    pub fn render(&self, messages: &[Message]) -> anyhow::Result<String> {
        let mut environment = self.environment.clone();
        let said: usize = messages.iter().map(|message| message.content.len()).sum();
        environment.set_fuel(Some(FUEL + said as u64));
        let template = environment.get_template(NAME).context("the model's chat template")?;
        let message = |message: &Message| {
            let role = match message.role {
                Role::System => "system",
                Role::User => "user",
                Role::Assistant => "assistant",
            };
            context! { role => role, content => message.content.as_str() }
        };
        let context = context! {
            messages => messages.iter().map(message).collect::<Vec<Value>>(),
            add_generation_prompt => true,
            bos_token => self.bos_token.as_deref().unwrap_or_default(),
            eos_token => self.eos_token.as_deref().unwrap_or_default(),
        };
        template.render(context).context("the model's chat template")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(said: &[(Role, &str)]) -> Vec<Message> {
        said.iter().map(|&(role, content)| Message { role, content: content.into() }).collect()
    }

    /// SmolLM2's, and LLaMA 2's in its essentials.
    #[test]
    fn conversations_are_written_as_their_templates_say() {
        let chat_ml = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n\
                       You are helpful.<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + \
                       '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";
        let template = Template::new(chat_ml.into(), None, None).unwrap();
        let hello = messages(&[(Role::User, "Hello")]);
        let expected = "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n";
        assert_eq!(template.render(&hello).unwrap(), expected);
        // What was said goes on word for word.
        let more = messages(&[(Role::User, "Hello"), (Role::Assistant, "Hi!"), (Role::User, "Bye")]);
        assert!(template.render(&more).unwrap().starts_with(&(expected.to_string() + "Hi!<|im_end|>\n")));

        let llama_2 = "{% for message in messages %}\n    {% if message.role == 'user' %}\n{{ bos_token + '[INST] ' + \
                       message.content.strip() + ' [/INST]' }}{% elif message.role == 'assistant' %}{{ ' ' + \
                       message['content'] | trim + ' ' + eos_token }}{% else %}{{ raise_exception('no system here') }}{% endif %}\n\
                       {% endfor %}";
        let template = Template::new(llama_2.into(), Some("<s>".into()), Some("</s>".into())).unwrap();
        assert_eq!(template.render(&more).unwrap(), "<s>[INST] Hello [/INST] Hi! </s><s>[INST] Bye [/INST]");
        let error = format!("{:#}", template.render(&messages(&[(Role::System, "x")])).unwrap_err());
        assert!(error.contains("no system here"), "{error}");
    }

    /// It comes with a model, and so from anybody.
    #[test]
    fn a_template_that_comes_to_no_end_is_an_error() {
        let hello = messages(&[(Role::User, "Hello")]);
        for endless in [
            "{% for a in range(10000) %}{% for b in range(10000) %}{% for c in range(10000) %}{% endfor %}{% endfor %}{% endfor %}",
            "{% macro more() %}{{ more() }}{{ more() }}{% endmacro %}{{ more() }}",
            &("{% set x = 'x' * 1000 %}".to_string() + &"{% set x = x ~ x %}".repeat(40) + "{{ x }}"),
        ] {
            let template = Template::new(endless.into(), None, None).unwrap();
            assert!(template.render(&hello).is_err(), "{endless}");
        }
        // As long as what was said, a few times over.
        let template =
            Template::new("{% for m in messages %}{{ m.content ~ '.' }}{% endfor %}".into(), None, None).unwrap();
        let long = "a".repeat(20 << 20);
        assert_eq!(template.render(&messages(&[(Role::User, &long)])).unwrap(), long + ".");
    }

    #[test]
    fn a_template_that_is_none_is_an_error() {
        assert!(Template::new("{% for %}".into(), None, None).is_err());
    }
}
