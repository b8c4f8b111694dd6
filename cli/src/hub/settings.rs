//! Where the Hub is, where its files are kept, and who asks: from the variables that its own tools read.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aha_core::config::Secret;
use anyhow::{Context, Result, ensure};

const ENDPOINT: &str = "https://huggingface.co";
/// For an answer to begin, and for a connection on which nothing moves.
const PATIENCE: Duration = Duration::from_secs(60);
/// Far over any token.
const MAX_TOKEN_BYTES: u64 = 4096;

#[derive(Debug, Clone)]
pub(super) struct Settings {
    /// Without a slash at its end.
    pub(super) endpoint: String,
    /// Folder of `models--owner--name`.
    pub(super) cache: PathBuf,
    /// Visible ASCII.
    pub(super) token: Option<Secret>,
    /// The network is not touched.
    pub(super) is_offline: bool,
    pub(super) patience: Duration,
}

impl Settings {
    pub(super) fn from_environment() -> Result<Self> {
        Self::from_variables(|name| std::env::var(name).ok().filter(|value| !value.is_empty()))
    }

    /// # Errors
    /// If there is no home folder, or a token that cannot be used; what it is does not show.
    pub(super) fn from_variables(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let path = |name| variable(name).map(PathBuf::from);
        let home = path("HF_HOME")
            .or_else(|| Some(path("XDG_CACHE_HOME")?.join("huggingface")))
            .or_else(|| Some(path("HOME")?.join(".cache/huggingface")))
            .context("no folder for what comes from the Hub: set HF_HOME")?;
        let token = match variable("HF_TOKEN") {
            Some(token) => Some(check_token("HF_TOKEN", &token)?),
            None => read_token(&path("HF_TOKEN_PATH").unwrap_or_else(|| home.join("token")))?,
        };
        let endpoint = variable("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned());
        let endpoint = endpoint.trim_end_matches('/').to_owned();
        let is_http = endpoint.starts_with("http://");
        ensure!(is_http || endpoint.starts_with("https://"), "HF_ENDPOINT: {endpoint:?} does not begin with https://");
        ensure!(
            !is_http || token.is_none() || is_loopback(&endpoint),
            "HF_ENDPOINT: {endpoint} would carry the token for all to read: use https, or unset HF_TOKEN"
        );
        let is_offline = variable("HF_HUB_OFFLINE")
            .is_some_and(|value| ["1", "on", "yes", "true"].contains(&value.to_ascii_lowercase().as_str()));
        let cache = path("HF_HUB_CACHE").unwrap_or_else(|| home.join("hub"));
        // Links in the cache, and what a run notes down, hold wherever they are read.
        let cache = std::path::absolute(cache).context("HF_HUB_CACHE")?;
        Ok(Self { endpoint, cache, token, is_offline, patience: PATIENCE })
    }
}

fn is_loopback(endpoint: &str) -> bool {
    let host = endpoint.trim_start_matches("http://").split(['/', '?']).next().unwrap_or_default();
    let is_port = |port: &str| !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
    let name = host.rsplit_once(':').filter(|(_, port)| is_port(port)).map_or(host, |(name, _)| name);
    ["127.0.0.1", "localhost", "[::1]"].contains(&name)
}

/// That of the Hub's own log-in, where there is one.
fn read_token(path: &Path) -> Result<Option<Secret>> {
    let Ok(metadata) = fs::metadata(path) else { return Ok(None) };
    ensure!(metadata.is_file() && metadata.len() <= MAX_TOKEN_BYTES, "{}: is no file of a token", path.display());
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    if text.trim().is_empty() { Ok(None) } else { check_token(&path.display().to_string(), &text).map(Some) }
}

fn check_token(origin: &str, text: &str) -> Result<Secret> {
    let text = text.trim();
    ensure!(
        text.bytes().all(|byte| byte.is_ascii_graphic()),
        "{origin}: a token is one word of visible ASCII characters"
    );
    Ok(Secret::new(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings> {
        Settings::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn the_folders_are_those_of_the_hubs_own_tools() {
        let cache = |variables: &[(&str, &str)]| settings(variables).unwrap().cache;
        assert_eq!(cache(&[("HOME", "/h")]), Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f")]), Path::new("/f/hub"));
        assert_eq!(cache(&[("HOME", "/h"), ("HF_HOME", "/f"), ("HF_HUB_CACHE", "/c")]), Path::new("/c"));
        assert!(settings(&[]).unwrap_err().to_string().contains("HF_HOME"));
        let offline = |value| settings(&[("HOME", "/h"), ("HF_HUB_OFFLINE", value)]).unwrap().is_offline;
        assert_eq!(["1", "TRUE", "0", ""].map(offline), [true, true, false, false]);
        assert_eq!(settings(&[("HOME", "/h"), ("HF_ENDPOINT", "https://m/")]).unwrap().endpoint, "https://m");
        assert!(settings(&[("HOME", "/h"), ("HF_ENDPOINT", "ftp://m")]).is_err());
    }

    #[test]
    fn hub_tokens_come_from_the_variable_or_the_log_in_and_show_nowhere() {
        let home = tempfile::tempdir().unwrap();
        let home_text = home.path().to_str().unwrap();
        assert_eq!(settings(&[("HF_HOME", home_text)]).unwrap().token, None);
        std::fs::write(home.path().join("token"), "hf_of_the_file\n").unwrap();
        let of_file = settings(&[("HF_HOME", home_text)]).unwrap();
        assert_eq!(of_file.token.as_ref().unwrap().expose(), "hf_of_the_file");
        let of_variable = settings(&[("HF_HOME", home_text), ("HF_TOKEN", "hf_of_the_variable")]).unwrap();
        assert_eq!(of_variable.token.as_ref().unwrap().expose(), "hf_of_the_variable");
        assert!(!format!("{of_file:?}{of_variable:?}").contains("of_the"));
        let bad = settings(&[("HF_HOME", home_text), ("HF_TOKEN", "hf_a b\u{7}")]).unwrap_err().to_string();
        assert!(bad.starts_with("HF_TOKEN: ") && !bad.contains("hf_a"), "{bad}");
    }

    #[test]
    fn a_hub_beyond_loopback_gets_the_token_by_https_alone() {
        let of = |endpoint| settings(&[("HOME", "/h"), ("HF_TOKEN", "hf_secret"), ("HF_ENDPOINT", endpoint)]);
        for endpoint in ["https://mirror", "http://127.0.0.1:80", "http://localhost"] {
            assert!(of(endpoint).is_ok(), "{endpoint}");
        }
        for endpoint in ["http://mirror", "http://127.0.0.1.evil.com", "http://127.0.0.1:80@evil.com"] {
            let error = of(endpoint).unwrap_err().to_string();
            assert!(error.contains("HF_ENDPOINT") && !error.contains("hf_secret"), "{error}");
        }
        assert!(settings(&[("HOME", "/h"), ("HF_ENDPOINT", "http://mirror")]).is_ok());
    }
}
