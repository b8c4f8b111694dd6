//! Who may call a generator, and how calls are encrypted.
//!
//! The section names files; [`Credentials`] are what is in them. Secrets are no part of the configuration, so that no
//! copy of it can hold any.

use std::fmt;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::validate::Problems;

/// The environment variable that holds a token. It wins over `security.token_file`.
pub const TOKEN_VARIABLE: &str = "AHA_TOKEN";
/// Bytes of a token: too many to guess, few enough for a header.
const TOKEN_BYTES: std::ops::RangeInclusive<usize> = 16..=1024;
/// Far over any token, key or chain of certificates.
const MAX_FILE_BYTES: u64 = 1 << 20;

/// The same section serves both sides. Paths are those of the machine that reads them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Security {
    /// File with the token that trainers send and generators ask for; the variable `AHA_TOKEN` wins over it.
    pub token_file: Option<PathBuf>,
    /// Certificate chain of this process, PEM. A generator that has one serves TLS alone; a trainer shows it to
    /// generators that ask for one.
    pub tls_cert: Option<PathBuf>,
    /// Private key of `tls_cert`, PEM.
    pub tls_key: Option<PathBuf>,
    /// Authority that signed the other side's certificates, PEM. A trainer that has one calls by TLS alone; a generator
    /// that has one refuses clients without a certificate of it (mTLS).
    pub tls_ca: Option<PathBuf>,
    /// Let a generator listen beyond loopback although anyone who reaches it may call: for networks of one's own.
    pub insecure: bool,
}

/// A text that is shown to nobody.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

/// What a process proves itself by, and what it asks of the other side.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Credentials {
    /// Visible ASCII.
    pub token: Option<Secret>,
    pub identity: Option<Identity>,
    /// Certificates of the authority that signs for the other side, PEM.
    pub ca: Option<String>,
    /// `security.insecure`.
    pub insecure: bool,
}

/// A certificate with its key, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    pub certificate: String,
    pub key: Secret,
}

impl Secret {
    #[must_use]
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The text itself, for the one place that needs it.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

impl Credentials {
    /// Reads what `security` names; `token` is the value of [`TOKEN_VARIABLE`], where it is set.
    ///
    /// # Errors
    /// Lists every file that cannot be used, with its key and path, and what is wrong with a token.
    pub fn load(security: &Security, token: Option<&str>) -> Result<Self, Vec<String>> {
        let mut problems = Problems::default();
        let from_file = read("token_file", security.token_file.as_deref(), &mut problems);
        let token = match (token, from_file) {
            (Some(text), _) => Some((TOKEN_VARIABLE, text.to_owned())),
            (None, Some(text)) => Some(("security.token_file", text)),
            (None, None) => None,
        };
        let token = token.and_then(|(origin, text)| check_token(origin, &text, &mut problems));
        let certificate = read_pem("tls_cert", security.tls_cert.as_deref(), "CERTIFICATE", &mut problems);
        let key = read_pem("tls_key", security.tls_key.as_deref(), "PRIVATE KEY", &mut problems);
        let ca = read_pem("tls_ca", security.tls_ca.as_deref(), "CERTIFICATE", &mut problems);
        let identity = certificate.zip(key).map(|(certificate, key)| Identity { certificate, key: Secret(key) });
        let credentials = Self { token, identity, ca, insecure: security.insecure };
        if problems.0.is_empty() { Ok(credentials) } else { Err(problems.0) }
    }
}

impl Security {
    pub(super) fn check(&self, problems: &mut Problems) {
        for (here, path, other, other_path) in [
            ("tls_cert", &self.tls_cert, "tls_key", &self.tls_key),
            ("tls_key", &self.tls_key, "tls_cert", &self.tls_cert),
        ] {
            problems.unless(path.is_none() || other_path.is_some(), || {
                format!("security.{other}: missing; security.{here} is of no use without it")
            });
        }
    }
}

/// The text of a file, where one is named and can be used.
fn read(key: &str, path: Option<&Path>, problems: &mut Problems) -> Option<String> {
    let path = path?;
    let text = match std::fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => Err("is no file".to_owned()),
        Ok(metadata) if metadata.len() > MAX_FILE_BYTES => Err(format!("has over {MAX_FILE_BYTES} bytes")),
        Ok(_) => std::fs::read_to_string(path).map_err(|error| error.to_string()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Err("no such file".to_owned()),
        Err(error) => Err(error.to_string()),
    };
    let text = text.and_then(|text| if text.trim().is_empty() { Err("is empty".to_owned()) } else { Ok(text) });
    match text {
        Ok(text) => Some(text),
        Err(reason) => {
            problems.0.push(format!("security.{key}: {}: {reason}", path.display()));
            None
        }
    }
}

/// Like [`read`]; a file without a block of this kind is a problem too. TLS itself would say less of it.
fn read_pem(key: &str, path: Option<&Path>, kind: &str, problems: &mut Problems) -> Option<String> {
    let text = read(key, path, problems)?;
    let block = |line: &str| {
        line.trim_end().strip_prefix("-----BEGIN ").is_some_and(|rest| rest.ends_with(&format!("{kind}-----")))
    };
    if text.lines().any(block) {
        return Some(text);
    }
    let path = path.unwrap_or(Path::new(""));
    problems.0.push(format!("security.{key}: {}: no block of type {kind} in it; name a PEM file", path.display()));
    None
}

/// The token without the white space around it. What is wrong is said without any of it.
fn check_token(origin: &str, text: &str, problems: &mut Problems) -> Option<Secret> {
    let token = text.trim();
    let (shortest, longest) = TOKEN_BYTES.into_inner();
    let fits = TOKEN_BYTES.contains(&token.len());
    problems.unless(fits, || {
        format!(
            "{origin}: a token has {shortest} to {longest} characters, got {}; openssl rand -hex 32 makes one",
            token.len()
        )
    });
    let sendable = token.bytes().all(|byte| byte.is_ascii_graphic());
    problems.unless(sendable, || {
        format!("{origin}: a token goes into a header, where only visible ASCII characters can be; openssl rand -hex 32 makes one")
    });
    (fits && sendable).then(|| Secret(token.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKEN: &str = "correct-horse-battery-staple";
    const PEM: &str = "-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n";
    const KEY: &str = "-----BEGIN EC PRIVATE KEY-----\nS0VZ\n-----END EC PRIVATE KEY-----\n";

    fn file(folder: &Path, name: &str, text: impl AsRef<[u8]>) -> Option<PathBuf> {
        let path = folder.join(name);
        std::fs::write(&path, text).unwrap();
        Some(path)
    }

    #[track_caller]
    fn check_token_problem(token: &str, expect: &str) {
        let problems = Credentials::load(&Security::default(), Some(token)).unwrap_err();
        assert!(
            problems.len() == 1 && problems[0].starts_with("AHA_TOKEN: ") && problems[0].contains(expect),
            "{problems:?}"
        );
        assert!(token.is_empty() || !problems[0].contains(token), "the token is in {problems:?}");
    }

    #[test]
    fn s8_secrets_are_not_shown_by_debug() {
        let folder = tempfile::tempdir().unwrap();
        let security = Security {
            tls_cert: file(folder.path(), "cert", PEM),
            tls_key: file(folder.path(), "key", KEY),
            tls_ca: file(folder.path(), "ca", PEM),
            ..Security::default()
        };
        let credentials = Credentials::load(&security, Some(TOKEN)).unwrap();
        assert_eq!(credentials.token.as_ref().unwrap().expose(), TOKEN);
        let identity = credentials.identity.as_ref().unwrap();
        assert_eq!((identity.certificate.as_str(), identity.key.expose()), (PEM, KEY));
        for shown in [format!("{credentials:?}"), format!("{credentials:#?}")] {
            assert!(shown.matches("***").count() == 2 && !shown.contains(TOKEN) && !shown.contains("S0VZ"), "{shown}");
        }
    }

    #[test]
    fn the_variable_wins_over_the_file_and_white_space_is_no_part_of_a_token() {
        let folder = tempfile::tempdir().unwrap();
        let security =
            Security { token_file: file(folder.path(), "token", format!("{TOKEN}\n")), ..Security::default() };
        let token = |variable| Credentials::load(&security, variable).unwrap().token.unwrap();
        assert_eq!(token(None).expose(), TOKEN);
        assert_eq!(token(Some("another-token-of-mine")).expose(), "another-token-of-mine");
        assert_eq!(Credentials::load(&Security::default(), None).unwrap(), Credentials::default());
    }

    #[test]
    fn tokens_that_cannot_be_sent_or_can_be_guessed_are_refused() {
        check_token_problem("", "got 0");
        check_token_problem("tooshort", "16 to 1024 characters, got 8");
        check_token_problem(&"x".repeat(1025), "got 1025");
        for token in
            ["correct horse battery", "correct\nhorse-battery", "corréct-horse-battery", "correct-horse\x7f-battery"]
        {
            check_token_problem(token, "visible ASCII");
        }
    }

    #[test]
    fn every_file_that_cannot_be_used_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let security = Security {
            token_file: file(folder.path(), "token", " \n"),
            tls_cert: Some(folder.path().join("absent")),
            tls_key: Some(folder.path().to_owned()),
            tls_ca: file(folder.path(), "ca", KEY),
            insecure: false,
        };
        let problems = Credentials::load(&security, None).unwrap_err();
        let expect = [
            ("security.token_file: ", "token: is empty"),
            ("security.tls_cert: ", "absent: no such file"),
            ("security.tls_key: ", "is no file"),
            ("security.tls_ca: ", "no block of type CERTIFICATE"),
        ];
        assert_eq!(problems.len(), expect.len(), "{problems:?}");
        for (problem, (key, reason)) in problems.iter().zip(expect) {
            assert!(problem.starts_with(key) && problem.contains(reason), "{problem}");
        }
        std::fs::write(folder.path().join("token"), [0xff; 40]).unwrap();
        assert!(Credentials::load(&security, None).unwrap_err()[0].contains("UTF-8"));
    }
}
