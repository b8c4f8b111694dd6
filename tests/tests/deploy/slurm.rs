//! deploy/slurm: the scripts run, with stand-ins for Slurm's programs.

use std::net::TcpListener;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use aha_core::config::{Launch, RunConfig};
use aha_tests::binary::aha;
use aha_tests::small_run;

use crate::{deploy, read};

const SCRIPTS: [&str; 2] = ["launch-one-node.sbatch", "heterogeneous.sbatch"];
/// What the trainers and the launch end with when the run is to go on later.
const RESUMABLE: i32 = 75;
/// Stands for aha where only signals and codes matter: SIGTERM ends it as it ends a run.
const STUB: &str = "#!/usr/bin/env bash
echo \"aha $*\" >>\"$SLURM_LOG\"
trap 'exit 75' TERM
[[ $2 == broken ]] && exit 3
echo ready >>\"$SLURM_LOG\"
while true; do sleep 0.05; done
";

/// Stands for aha where only its arguments and variables matter. When the trainers have ended, generators are ended too,
/// so trainers wait until all of those are in the log.
const RECORDER: &str = "#!/usr/bin/env bash
echo \"$* gpu=${CUDA_VISIBLE_DEVICES:-} $WORLD_SIZE $MASTER_ADDR:$MASTER_PORT ${RANK:-} ${LOCAL_RANK:-}/${LOCAL_WORLD_SIZE:-}\" >>\"$SLURM_LOG\"
[[ $1 == trainer ]] || exit 0
for ((tenths = 0; tenths < 1000; tenths++)); do
  [[ $(grep -c '^generator' \"$SLURM_LOG\") == 4 ]] && exit 0
  sleep 0.1
done
exit 1
";

/// A cluster of one machine, and a folder to run in.
struct Cluster {
    folder: tempfile::TempDir,
    root: PathBuf,
}

impl Cluster {
    /// With `stub` for the program `aha`, or the real one.
    fn new(stub: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let programs = root.join("bin");
        std::fs::create_dir(&programs).unwrap();
        install(&programs.join("srun"), include_str!("srun.sh"));
        install(&programs.join("scontrol"), include_str!("scontrol.sh"));
        match stub {
            Some(stub) => install(&programs.join("aha"), stub),
            None => symlink(aha(), programs.join("aha")).unwrap(),
        }
        Self { folder, root }
    }

    fn start(&self, script: &str, arguments: &[&str], variables: &[(&str, String)]) -> Child {
        let path = std::env::var("PATH").unwrap();
        Command::new("bash")
            .arg(deploy("slurm").join(script))
            .args(arguments)
            .current_dir(&self.root)
            .env("PATH", format!("{}:{path}", self.root.join("bin").display()))
            .env("SLURM_LOG", self.root.join("slurm.log"))
            .env("SLURM_JOB_ID", "4711")
            .env("OMP_NUM_THREADS", "1")
            .env_remove("CUDA_VISIBLE_DEVICES")
            .envs(variables.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(std::fs::File::create(self.root.join("stderr")).unwrap())
            .spawn()
            .unwrap()
    }

    /// What was asked of Slurm's programs, a line each.
    fn log(&self) -> String {
        std::fs::read_to_string(self.root.join("slurm.log")).unwrap_or_default()
    }

    fn stderr(&self) -> String {
        read(&self.root.join("stderr"))
    }

    fn was_requeued(&self) -> bool {
        self.log().lines().any(|line| line == "scontrol requeue 4711")
    }

    /// Processes of the run that are still there, by their working folder.
    fn processes(&self) -> usize {
        let entries = std::fs::read_dir("/proc").unwrap().flatten();
        entries.filter(|entry| std::fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == self.root)).count()
    }

    #[track_caller]
    fn wait_until(&self, what: &str, mut condition: impl FnMut() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(180);
        while !condition() {
            assert!(Instant::now() < deadline, "{what} did not happen: {}{}", self.log(), self.stderr());
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// The code of a script that ends by itself.
    #[track_caller]
    fn code(&self, mut script: Child) -> Option<i32> {
        let mut code = None;
        self.wait_until("the script's end", || {
            code = script.try_wait().unwrap();
            code.is_some()
        });
        code.unwrap().code()
    }
}

fn install(path: &Path, script: &str) {
    std::fs::write(path, script).unwrap();
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
}

fn signal(child: &Child, signal: &str) {
    assert!(Command::new("kill").args([&format!("-{signal}"), &child.id().to_string()]).status().unwrap().success());
}

/// Ports below those of outgoing connections, one after the other.
pub(crate) fn free_ports(count: u16) -> u16 {
    let start = 30_000 + (std::process::id() as u16).wrapping_mul(31) % 2_000;
    let is_free = |first: &u16| (0..count).all(|n| TcpListener::bind(("127.0.0.1", first + n)).is_ok());
    (start..32_700).find(is_free).expect("free ports")
}

/// Values of an `#SBATCH` option, of each component of the job.
fn options(script: &str, name: &str) -> Vec<String> {
    let lines = script.lines().filter_map(|line| line.strip_prefix("#SBATCH --"));
    lines
        .filter_map(|line| line.split_once('='))
        .filter(|(other, _)| *other == name)
        .map(|(_, value)| value.to_owned())
        .collect()
}

#[test]
fn scripts_are_bash_and_leave_time_to_save() {
    for name in SCRIPTS {
        let path = deploy("slurm").join(name);
        let check = Command::new("bash").arg("-n").arg(&path).output().unwrap();
        assert!(check.status.success(), "{name}: {}", String::from_utf8_lossy(&check.stderr));
        let script = read(&path);
        assert!(script.starts_with("#!/usr/bin/env bash\n"));
        let body = script.lines().find(|line| !line.starts_with('#')).unwrap();
        assert_eq!(body, "set -euo pipefail", "Slurm reads no #SBATCH after the first command");
        let [signal] = &options(&script, "signal")[..] else { panic!("one --signal in {name}") };
        let time: f64 = signal.strip_prefix("B:USR1@").expect("a warning to the script alone").parse().unwrap();
        let Launch { save_seconds, grace_seconds, .. } = RunConfig::default().launch;
        assert!(time >= save_seconds + 2.0 * grace_seconds, "{name} is warned {time} s before its end");
    }
    let script = read(&deploy("slurm/heterogeneous.sbatch"));
    let [trainers, generators] = &options(&script, "ntasks-per-node")[..] else { panic!("two components") };
    assert!(script.contains(&format!("trainers_per_node=${{TRAINERS_PER_NODE:-{trainers}}}\n")));
    assert!(script.contains(&format!("generators_per_node=${{GENERATORS_PER_NODE:-{generators}}}\n")));
    assert_eq!(options(&script, "gpus-per-node"), [trainers.as_str(), generators], "a GPU for every task");
    for cpus in options(&script, "cpus-per-task") {
        assert!(script.contains(&format!("cpus_per_task=${{CPUS_PER_TASK:-{cpus}}}\n")));
    }
}

/// Real ranks and a real generator, started as srun would start them.
#[test]
fn a_heterogeneous_job_trains_saves_and_goes_on() {
    let cluster = Cluster::new(None);
    small_run::write(&cluster.root);
    small_run::write_base(&cluster.root);
    let port = free_ports(3);
    let variables = [
        ("SLURM_JOB_NODELIST_HET_GROUP_0", "127.0.0.1".to_owned()),
        ("SLURM_JOB_NODELIST_HET_GROUP_1", "127.0.0.1".to_owned()),
        ("TRAINERS_PER_NODE", "2".to_owned()),
        ("GENERATORS_PER_NODE", "2".to_owned()),
        ("CPUS_PER_TASK", "1".to_owned()),
        ("GENERATOR_PORT", port.to_string()),
        ("MASTER_PORT", (port + 2).to_string()),
    ];
    let start = || cluster.start("heterogeneous.sbatch", &["run.yaml", "--set", "logging.logging_steps=1"], &variables);
    let run = cluster.root.join("runs/small");

    let script = start();
    cluster.wait_until("the first checkpoint", || run.join("checkpoints/step-2").is_dir());
    assert!(!cluster.was_requeued());
    signal(&script, "USR1");
    assert_eq!(cluster.code(script), Some(RESUMABLE), "{}", cluster.stderr());
    assert!(cluster.was_requeued() && !run.join("summary.json").exists());
    assert_eq!(cluster.processes(), 0, "processes stayed behind");

    assert_eq!(cluster.code(start()), Some(0), "{}", cluster.stderr());
    assert!(run.join("summary.json").exists() && run.join("model/model.safetensors").exists());
    assert_eq!(cluster.log().matches("scontrol requeue").count(), 1, "a run that is done is not started again");
    assert_eq!(cluster.processes(), 0, "processes stayed behind");
    let config = read(&run.join("config.yaml"));
    assert!(config.contains(&format!("127.0.0.1:{port}")) && config.contains(&format!("127.0.0.1:{}", port + 1)));
    drop(cluster.folder);
}

#[test]
fn generators_of_every_node_get_a_gpu_and_a_port_each() {
    let cluster = Cluster::new(Some(RECORDER));
    let variables = [
        ("SLURM_JOB_NODELIST_HET_GROUP_0", "gpu1,gpu2".to_owned()),
        ("SLURM_JOB_NODELIST_HET_GROUP_1", "gpu7,gpu8".to_owned()),
        ("TRAINERS_PER_NODE", "2".to_owned()),
        ("GENERATORS_PER_NODE", "2".to_owned()),
        ("CUDA_VISIBLE_DEVICES", "4,5".to_owned()),
    ];
    assert_eq!(cluster.code(cluster.start("heterogeneous.sbatch", &["x.yaml"], &variables)), Some(0));
    let log = cluster.log();
    let addresses = r#"["gpu7:50051","gpu7:50052","gpu8:50051","gpu8:50052"]"#;
    for rank in 0..4 {
        let expect = format!(
            "trainer x.yaml --set train.threads=8 --set generator.addresses={addresses} gpu=4,5 4 gpu1:24711 {rank} {}/2",
            rank % 2
        );
        assert!(log.lines().any(|line| line == expect), "no {expect}\n{log}");
    }
    for (local_id, gpu) in [(0, 4), (1, 5)] {
        let expect = format!("generator x.yaml --listen 0.0.0.0:{} gpu={gpu} ", 50_051 + local_id);
        assert!(log.lines().any(|line| line.starts_with(&expect)), "no {expect}\n{log}");
    }
    assert!(log.contains("srun --het-group=0 --ntasks=4 --ntasks-per-node=2"), "{log}");
    assert!(log.contains("srun --het-group=1 --ntasks=4 --ntasks-per-node=2"), "{log}");
}

#[test]
fn one_node_goes_on_after_a_warning_and_not_otherwise() {
    for (warning, requeued) in [("USR1", true), ("USR2", false)] {
        let cluster = Cluster::new(Some(STUB));
        let script = cluster.start("launch-one-node.sbatch", &["x.yaml", "--set", "train.max_steps=3"], &[]);
        cluster.wait_until("the launch", || cluster.log().contains("ready"));
        signal(&script, warning);
        assert_eq!(cluster.code(script), Some(RESUMABLE));
        assert!(cluster.log().starts_with("aha launch x.yaml --set train.max_steps=3\n"), "{}", cluster.log());
        assert_eq!(cluster.was_requeued(), requeued, "{warning}");
    }
    let cluster = Cluster::new(Some(STUB));
    assert_eq!(cluster.code(cluster.start("launch-one-node.sbatch", &["broken"], &[])), Some(3));
    assert!(!cluster.was_requeued());
    for script in SCRIPTS {
        assert_eq!(cluster.code(cluster.start(script, &[], &[])), Some(1));
        assert!(cluster.stderr().contains("usage: sbatch"), "{}", cluster.stderr());
    }
}
