//! Commands that documentation tells people to run.

use crate::golden::workspace;

/// The lines of a document's blocks without a language, in their order.
///
/// # Panics
/// If it cannot be read.
#[must_use]
pub fn commands(document: &str) -> Vec<String> {
    let path = workspace().join(document);
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let mut language = None;
    let mut commands = Vec::new();
    for line in text.lines() {
        match (line.strip_prefix("```"), language) {
            (Some(opened), None) => language = Some(opened),
            (Some(_), Some(_)) => language = None,
            (None, Some("")) => commands.push(line.to_owned()),
            _ => {}
        }
    }
    commands
}
