//! libtorch, the CUDA driver, GPUs, and which rank gets which.

use aha_core::config::{DeviceKind, RunConfig};
use aha_nn::build_info::{Libtorch, libtorch};
use aha_nn::comm::nccl_built;
use aha_nn::kernels::cuda::{DriverInfo, driver_info, nccl_version};
use aha_nn::runtime::num_cuda_devices;
use aha_trainer::world::World;

use super::finding::{Finding, gib};

/// The libtorch that tch is made for.
const TORCH: &str = "2.11.";
/// The oldest GPUs that have bf16, which the kernels need.
const MIN_CAPABILITY: u32 = 8;

/// What this process has of each.
#[derive(Debug)]
pub(super) struct Devices {
    libtorch: Libtorch,
    driver: Result<DriverInfo, String>,
    has_nccl: bool,
    /// GPUs that libtorch can use.
    pub(super) num_gpus: usize,
    /// Memory of the smallest GPU.
    pub(super) gpu_bytes: Option<u64>,
}

impl Devices {
    pub(super) fn here() -> Self {
        let driver = driver_info();
        let gpus = driver.iter().flat_map(|driver| &driver.gpus);
        let gpu_bytes = gpus.map(|gpu| gpu.memory_bytes).min();
        Self { libtorch: libtorch(), driver, has_nccl: nccl_built(), num_gpus: num_cuda_devices(), gpu_bytes }
    }

    pub(super) fn findings(&self, device: DeviceKind) -> Vec<Finding> {
        let mut findings = vec![self.library()];
        findings.extend(self.gpus(device));
        if self.libtorch.cuda.is_some() {
            findings.push(match (self.has_nccl, nccl_version()) {
                (true, Some(version)) => Finding::ok("nccl", format!("NCCL {version}")),
                (true, None) => Finding::ok("nccl", "NCCL is part of libtorch; its version is not known"),
                (false, _) => Finding::problem(
                    "nccl",
                    "aha was built without NCCL: its headers were not beside libtorch's",
                    "cargo xtask setup, then build aha again",
                ),
            });
        }
        findings
    }

    fn library(&self) -> Finding {
        let Libtorch { version, cuda, path } = &self.libtorch;
        let build = cuda.as_ref().map_or("a CPU build".to_owned(), |cuda| format!("built for CUDA {cuda}"));
        let path = path.as_ref().map_or("a place unknown".to_owned(), |path| path.display().to_string());
        let found = format!("{version}, {build}, from {path}");
        if version.starts_with(TORCH) {
            return Finding::ok("libtorch", found);
        }
        let fix = format!("use libtorch {TORCH}x: cargo xtask setup fetches it, LD_LIBRARY_PATH may name another");
        Finding::warning("libtorch", found, fix)
    }

    fn gpus(&self, device: DeviceKind) -> Vec<Finding> {
        let driver = match &self.driver {
            Ok(driver) => driver,
            Err(reason) if device == DeviceKind::Cuda => {
                let fix = "install NVIDIA's driver, give the container its GPUs, or set model.device: cpu";
                return vec![Finding::problem("cuda driver", format!("none, and model.device is cuda: {reason}"), fix)];
            }
            Err(reason) => return vec![Finding::ok("cuda driver", format!("none, so a CPU computes: {reason}"))],
        };
        let mut findings = vec![self.driver(driver)];
        for (index, gpu) in driver.gpus.iter().enumerate() {
            let (major, minor) = (gpu.capability.major, gpu.capability.minor);
            let found = format!("{index}: {}, {}, compute capability {major}.{minor}", gpu.name, gib(gpu.memory_bytes));
            findings.push(if major >= MIN_CAPABILITY {
                Finding::ok("gpu", found)
            } else {
                let fix = format!("use a GPU of compute capability {MIN_CAPABILITY}.0 or newer, or model.device: cpu");
                Finding::problem("gpu", format!("{found}: it has no bf16"), fix)
            });
        }
        if device != DeviceKind::Cpu && self.num_gpus < driver.gpus.len() {
            let found = format!("libtorch can use {} of {} GPUs", self.num_gpus, driver.gpus.len());
            let fix = if self.libtorch.cuda.is_none() {
                "build aha against a CUDA libtorch (LIBTORCH names its folder), or set model.device: cpu"
            } else {
                "check CUDA_VISIBLE_DEVICES and the driver's version"
            };
            let is_needed = device == DeviceKind::Cuda && self.num_gpus == 0;
            findings.push(if is_needed {
                Finding::problem("gpu", found, fix)
            } else {
                Finding::warning("gpu", found, fix)
            });
        }
        findings
    }

    /// Minor versions of one major version work together.
    fn driver(&self, driver: &DriverInfo) -> Finding {
        let major = |version: &str| version.split('.').next().and_then(|major| major.parse::<u32>().ok());
        let found = format!("runs CUDA {}, with {} GPUs", driver.cuda, driver.gpus.len());
        match &self.libtorch.cuda {
            Some(cuda) if major(cuda) > major(&driver.cuda) => {
                let fix = format!("update NVIDIA's driver to one for CUDA {cuda}");
                Finding::problem("cuda driver", format!("{found}, and libtorch is built for CUDA {cuda}"), fix)
            }
            _ => Finding::ok("cuda driver", found),
        }
    }
}

/// Whether every trainer rank of this machine has a GPU of its own. `num_gpus` are those that ranks would use: 0 on a CPU.
pub(super) fn ranks(world: &World, config: Option<&RunConfig>, num_gpus: usize) -> Finding {
    const CHECK: &str = "ranks";
    let explain = "NCCL refuses two ranks on one GPU, which would share its memory and its time anyway";
    if num_gpus > 0 && world.local_rank >= num_gpus {
        let local = world.local_rank;
        let found =
            format!("LOCAL_RANK is {local}, and {num_gpus} GPUs are visible: two ranks would share one. {explain}");
        let fix = format!("start at most {num_gpus} trainer ranks on this machine, or check CUDA_VISIBLE_DEVICES");
        return Finding::problem(CHECK, found, fix);
    }
    let num_launched = config.map_or(0, |config| config.launch.trainers);
    if num_gpus > 0 && num_launched > num_gpus {
        let found = format!("launch.trainers is {num_launched}, and {num_gpus} GPUs are visible. {explain}");
        return Finding::problem(CHECK, found, format!("set launch.trainers to {num_gpus} at most"));
    }
    let World { rank, size, local_rank, .. } = world;
    Finding::ok(CHECK, format!("rank {rank} of {size}, number {local_rank} on this machine, {num_gpus} GPUs for ranks"))
}

#[cfg(test)]
mod tests {
    use aha_nn::kernels::cuda::{Gpu, GpuInfo};

    use super::super::finding::Severity;
    use super::*;

    fn devices(cuda: Option<&str>, driver: &str, major: u32, num_gpus: usize) -> Devices {
        let gpu =
            |index| GpuInfo { name: format!("G{index}"), memory_bytes: 80 << 30, capability: Gpu { major, minor: 0 } };
        let libtorch = Libtorch { version: "2.11.0".to_owned(), cuda: cuda.map(str::to_owned), path: None };
        let driver = Ok(DriverInfo { cuda: driver.to_owned(), gpus: (0..2).map(gpu).collect() });
        Devices { libtorch, driver, has_nccl: true, num_gpus, gpu_bytes: Some(80 << 30) }
    }

    #[track_caller]
    fn check(devices: &Devices, device: DeviceKind, severity: Severity, expect: &str) {
        let findings = devices.findings(device);
        assert_eq!(findings.iter().map(|finding| finding.severity).max(), Some(severity), "{findings:?}");
        assert!(findings.iter().any(|finding| finding.finding.contains(expect)), "no {expect:?} in {findings:?}");
    }

    #[test]
    fn what_does_not_fit_together_is_found() {
        check(
            &devices(Some("13.0"), "13.1", 9, 2),
            DeviceKind::Auto,
            Severity::Ok,
            "1: G1, 80.0 GiB, compute capability 9.0",
        );
        check(&devices(Some("13.0"), "12.4", 9, 2), DeviceKind::Auto, Severity::Problem, "built for CUDA 13.0");
        check(&devices(Some("13.0"), "13.0", 7, 2), DeviceKind::Auto, Severity::Problem, "it has no bf16");
        check(&devices(None, "13.0", 9, 0), DeviceKind::Auto, Severity::Warning, "libtorch can use 0 of 2 GPUs");
        check(&devices(None, "13.0", 9, 0), DeviceKind::Cuda, Severity::Problem, "libtorch can use 0 of 2 GPUs");
        let old = Libtorch { version: "2.4.1".to_owned(), cuda: None, path: None };
        check(&Devices { libtorch: old, ..devices(None, "13.0", 9, 0) }, DeviceKind::Cpu, Severity::Warning, "2.4.1");
        let without = Devices { has_nccl: false, ..devices(Some("13.0"), "13.0", 9, 2) };
        check(&without, DeviceKind::Auto, Severity::Problem, "built without NCCL");
        let none = Devices { driver: Err("no libcuda.so.1".to_owned()), ..devices(None, "", 0, 0) };
        check(&none, DeviceKind::Auto, Severity::Ok, "no libcuda.so.1");
        check(&none, DeviceKind::Cuda, Severity::Problem, "no libcuda.so.1");
    }

    #[test]
    fn two_ranks_on_one_gpu_are_a_problem() {
        let world = |local_rank| World { local_rank, size: 4, ..World::single() };
        let severity = |local_rank, num_gpus| ranks(&world(local_rank), None, num_gpus).severity;
        assert_eq!([severity(1, 2), severity(2, 2), severity(2, 0)], [Severity::Ok, Severity::Problem, Severity::Ok]);
        let mut config = RunConfig::default();
        config.launch.trainers = 3;
        assert!(ranks(&World::single(), Some(&config), 2).finding.contains("launch.trainers is 3"));
    }
}
