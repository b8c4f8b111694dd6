//! A chat template of a stranger: it renders or fails, soon, and without taking all memory.
#![no_main]

use aha_core::chat_template::{ChatTemplate, Ending, Message};
use libfuzzer_sys::fuzz_target;
use serde_json::Map;

fuzz_target!(|source: &str| {
    let Ok(template) = ChatTemplate::new(source, Map::new()) else { return };
    let messages = [Message::new("system", "Think."), Message::new("user", "1 + 1?"), Message::new("assistant", "2")];
    for ending in [Ending::GenerationPrompt, Ending::ContinueFinalMessage] {
        // Templates may raise whatever they like.
        drop(template.render(&messages, ending, &Map::new()));
    }
});
