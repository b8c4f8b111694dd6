//! deploy/docker.

use std::path::Path;
use std::process::Command;

use aha_core::config;
use aha_tests::binary;
use aha_tests::golden::workspace;

use crate::{WORKDIR, deploy, load, read};

/// Packages of Debian that the image installs, or has, and their libraries.
const SYSTEM_LIBRARIES: [(&str, &[&str]); 3] = [
    (
        "libc6",
        &["linux-vdso.so", "ld-linux", "libc.so", "libm.so", "libdl.so", "librt.so", "libpthread.so", "libutil.so"],
    ),
    ("libgcc-s1", &["libgcc_s.so"]),
    ("libstdc++6", &["libstdc++.so"]),
];

struct Stage {
    image: String,
    name: Option<String>,
    instructions: Vec<(String, String)>,
}

impl Stage {
    fn all(&self, name: &'static str) -> impl DoubleEndedIterator<Item = &str> {
        self.instructions.iter().filter(move |(other, _)| other == name).map(|(_, rest)| rest.as_str())
    }

    #[track_caller]
    fn last(&self, name: &'static str) -> &str {
        self.all(name).next_back().unwrap_or_else(|| panic!("no {name}"))
    }

    /// `ENV` and `ARG` of the stage.
    fn variables(&self) -> Vec<(String, String)> {
        let words = self.all("ENV").chain(self.all("ARG")).flat_map(str::split_whitespace);
        words.filter_map(|word| word.split_once('=')).map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[track_caller]
    fn variable(&self, name: &str) -> String {
        let found = self.variables().into_iter().find(|(other, _)| other == name);
        found.unwrap_or_else(|| panic!("no {name}")).1
    }

    /// Sources, target and, where it is not the context, the stage of every COPY.
    fn copies(&self) -> Vec<(Option<&str>, Vec<&str>, &str)> {
        let split = |text| {
            let (flags, mut paths): (Vec<&str>, Vec<&str>) =
                str::split_whitespace(text).partition(|word| word.starts_with("--"));
            let target = paths.pop().unwrap();
            (flags.into_iter().find_map(|flag| flag.strip_prefix("--from=")), paths, target)
        };
        self.all("COPY").map(split).collect()
    }
}

/// The stages, the last of which becomes the image.
fn stages() -> Vec<Stage> {
    let text = read(&deploy("docker/Dockerfile"));
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim_start().starts_with('#')).collect();
    let mut stages: Vec<Stage> = Vec::new();
    for line in lines.join("\n").replace("\\\n", " ").lines().filter(|line| !line.trim().is_empty()) {
        let (name, rest) = line.split_once(' ').unwrap();
        if name == "FROM" {
            let words: Vec<&str> = rest.split_whitespace().collect();
            let name = words.iter().position(|word| *word == "AS").map(|index| words[index + 1].to_owned());
            stages.push(Stage { image: words[0].to_owned(), name, instructions: Vec::new() });
        } else {
            stages.last_mut().expect("FROM comes first").instructions.push((name.to_owned(), rest.trim().to_owned()));
        }
    }
    stages
}

/// Whether the context has a path: the last pattern that matches it, or a folder above it, decides.
fn is_in_context(path: &str) -> bool {
    let top = Path::new(path).iter().next().unwrap().to_str().unwrap();
    let mut included = true;
    for pattern in read(&deploy("docker/Dockerfile.dockerignore")).lines().filter(|line| !line.starts_with('#')) {
        match pattern.strip_prefix('!') {
            Some(name) if name == top => included = true,
            None if pattern == "*" || pattern == top => included = false,
            _ => {}
        }
    }
    included
}

#[test]
fn base_images_are_pinned_and_belong_together() {
    let stages = stages();
    let [builder, image] = stages.as_slice() else { panic!("a builder and an image") };
    for stage in &stages {
        let tag = stage.image.split_once(':').map_or("", |(_, tag)| tag);
        assert!(!tag.is_empty() && tag != "latest", "{} has no tag of its own", stage.image);
        // One release of Debian, and so one C library.
        assert!(tag.contains("bookworm"), "{}", stage.image);
    }
    let version = |text: &str| -> Vec<u32> { text.split('.').map_while(|part| part.parse().ok()).collect() };
    let rust = builder.image.strip_prefix("rust:").and_then(|tag| tag.split('-').next()).unwrap();
    assert!(version(rust) >= version(env!("CARGO_PKG_RUST_VERSION")), "{rust} is too old");
    for (from, _, _) in image.copies() {
        assert!(from.is_none() || from == builder.name.as_deref(), "no stage is called {from:?}");
    }
}

#[test]
fn the_build_has_what_it_needs() {
    let stages = stages();
    let builder = &stages[0];
    let torch = builder.variable("TORCH_VERSION");
    let setup = read(&workspace().join("xtask/src/libtorch.rs"));
    assert!(setup.contains(&format!("const TORCH_VERSION: &str = \"{torch}\";")), "setup fetches another torch");
    let packages = builder.all("RUN").next().unwrap();
    for package in ["g++", "python3", "python3-pip"] {
        assert!(packages.split_whitespace().any(|word| word == package), "{package} is not installed");
    }
    let manifest = read(&workspace().join("Cargo.toml"));
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = ")).unwrap();
    let members: Vec<String> = serde_json::from_str(members).unwrap();
    for path in members.iter().map(String::as_str).chain(["Cargo.lock", "Cargo.toml", ".cargo/config.toml"]) {
        assert!(workspace().join(path).exists() && is_in_context(path), "the context lacks {path}");
    }
    for path in [".git", ".libtorch", "target", "runs", "models"] {
        assert!(!is_in_context(path), "the context has {path}");
    }
    for (_, sources, _) in stages[1].copies().into_iter().filter(|(from, ..)| from.is_none()) {
        for source in sources {
            assert!(workspace().join(source).exists() && is_in_context(source), "the context lacks {source}");
        }
    }
}

/// libtorch lies where the builder had it, with the wheels that it loads beside it, and nothing else is missing.
#[test]
fn the_image_has_every_library_that_the_binary_loads() {
    let stages = stages();
    let [builder, image] = stages.as_slice() else { panic!("a builder and an image") };
    let torch = builder.variable("LIBTORCH");
    let site = torch.strip_suffix("/torch").unwrap();
    let kept = |folder: &str| {
        let copies = image.copies();
        copies.iter().any(|(from, sources, target)| from.is_some() && sources == &[folder] && *target == folder)
    };
    assert!(kept(&format!("{torch}/lib")) && kept(&format!("{site}/nvidia")), "{torch} is not in its place");

    let ldd = Command::new("ldd").arg(binary::aha()).output().unwrap();
    let ldd = String::from_utf8(ldd.stdout).unwrap();
    let here =
        ldd.lines().find_map(|line| line.split_once("/torch/lib/libtorch_cpu.so")).expect("libtorch is loaded").0;
    let here = here.split_whitespace().last().unwrap();
    let installed = image.all("RUN").next().unwrap();
    for line in ldd.lines() {
        let (name, path) = line.trim().split_once(" => ").unwrap_or((line.trim(), ""));
        let in_wheels = ["torch/lib/", "nvidia/"].iter().any(|folder| path.starts_with(&format!("{here}/{folder}")));
        let package = SYSTEM_LIBRARIES.iter().find(|(_, names)| names.iter().any(|system| name.contains(system)));
        let in_system = package.is_some_and(|(package, _)| *package == "libc6" || installed.contains(package));
        assert!(in_wheels || in_system, "the image has no {name}, here {path}");
    }
}

#[test]
fn the_image_runs_as_nobody_and_knows_its_health() {
    let stages = stages();
    let image = &stages[1];
    let user = image.last("USER").split(':').next().unwrap();
    assert!(user.parse::<u32>().is_ok_and(|id| id > 0), "USER {user}: only a number can be seen not to be root");
    assert_eq!(image.last("ENTRYPOINT"), "[\"aha\"]");
    assert_eq!(image.last("WORKDIR"), WORKDIR);
    assert!(
        image
            .copies()
            .iter()
            .any(|(_, sources, target)| sources == &["configs"] && *target == format!("{WORKDIR}/configs"))
    );

    let config = load(&workspace().join("configs/countdown-tiny.yaml"), &image.variables(), &[]);
    let metrics = config.generator.metrics_address.expect("the health check asks for metrics");
    assert!(image.last("HEALTHCHECK").contains(&format!("\"http://{metrics}/metrics\"")));
    assert!(image.all("RUN").next().unwrap().split_whitespace().any(|word| word == "curl"));
    let kernels = config.generator.kernel_cache.unwrap();
    assert!(kernels.starts_with(config::Run::default().output_dir), "{} is not kept", kernels.display());
}
