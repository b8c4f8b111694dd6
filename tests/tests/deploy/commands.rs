//! Command lines of `aha` in files, held against the binary.

use std::path::Path;

use aha_core::config::RunConfig;
use aha_tests::binary;
use aha_tests::golden::workspace;

/// One `aha` command line.
#[derive(Debug, Clone)]
pub(crate) struct Invocation {
    pub(crate) words: Vec<String>,
}

impl Invocation {
    pub(crate) fn new<T: ToString>(words: &[T]) -> Self {
        Self { words: words.iter().map(ToString::to_string).collect() }
    }

    /// Every `aha SUBCOMMAND ...` of a line of shell, up to what ends a command there.
    pub(crate) fn in_shell(script: &str) -> Vec<Self> {
        let ends = |c: char| ";&|\n'\"".contains(c);
        let commands = script.split(ends).filter_map(|command| {
            let words: Vec<&str> = command.split_whitespace().skip_while(|word| *word != "aha").skip(1).collect();
            (!words.is_empty()).then(|| Self::new(&words))
        });
        commands.collect()
    }

    pub(crate) fn subcommand(&self) -> &str {
        &self.words[0]
    }

    pub(crate) fn recipe(&self) -> &str {
        &self.words[1]
    }

    /// The value of an option.
    pub(crate) fn option(&self, name: &str) -> Option<&str> {
        self.options(name).next()
    }

    fn options(&self, name: &str) -> impl Iterator<Item = &str> {
        let pairs = self.words.iter().zip(self.words.iter().skip(1));
        pairs.filter(move |(option, _)| *option == name).map(|(_, value)| value.as_str())
    }

    /// Whether clap takes the words. It looks at them one by one until it comes to `--help`.
    pub(crate) fn is_taken(&self) -> bool {
        let mut words: Vec<&str> = self.words.iter().map(String::as_str).collect();
        words.push("--help");
        binary::run(&workspace(), &words).status.success()
    }

    /// Loads the recipe, which lies at `path` here, as the process would.
    #[track_caller]
    pub(crate) fn load(&self, path: &Path, variables: &[(String, String)]) -> RunConfig {
        let overrides: Vec<String> = self.options("--set").map(str::to_owned).collect();
        crate::load(path, variables, &overrides)
    }
}

#[test]
fn command_lines_that_aha_does_not_take_are_found() {
    let taken = |text: &str| Invocation::new(&text.split(' ').collect::<Vec<_>>()).is_taken();
    assert!(taken("generator configs/countdown-tiny.yaml --listen 0.0.0.0:50051 --set generator.threads=1"));
    assert!(!taken("generator configs/countdown-tiny.yaml --listen 0.0.0.0"));
    assert!(!taken("generator configs/countdown-tiny.yaml --port 50051"));
    assert!(!taken("trainer configs/countdown-tiny.yaml --listen 0.0.0.0:50051"));
    assert!(!taken("trainers configs/countdown-tiny.yaml"));
}

#[test]
fn commands_are_found_in_shell() {
    let script = "test -d x || exec aha sft configs/a.yaml && aha launch b.yaml --trainers 2; echo aha-x";
    let found: Vec<Vec<String>> = Invocation::in_shell(script).into_iter().map(|command| command.words).collect();
    assert_eq!(found, [vec!["sft", "configs/a.yaml"], vec!["launch", "b.yaml", "--trainers", "2"]]);
}
