// Boxes of one frame from a package of `python -m cmt_aqr.tools.export --to pt2 --package`, without Python.
//
//     detect model.package.pt2 FOLDER [LEAST_SCORE]
//
// FOLDER holds one raw file for every input of the package, as numpy's array.tofile writes them: images.bin (uint8
// V x H x W x 3, R G B), points.bin (float32 P x 5), lidar2img.bin (float64 V x 4 x 4). The metadata of the package gives
// their types and sizes; cmt_aqr/deployment.py explains inputs and outputs.

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cmath>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <sstream>
#include <stdexcept>

using About = std::unordered_map<std::string, std::string>;

std::vector<std::string> words(const std::string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<std::string>(stream), {}};
}

// A file as a tensor of the type and sizes in the metadata, such as "float32 1 x 126976 x 5: ...".
at::Tensor read_input(const std::string& folder, const std::string& name, const About& about) {
  static const std::map<std::string, at::ScalarType> types = {
      {"uint8", at::kByte}, {"float32", at::kFloat}, {"float64", at::kDouble}};
  const std::string kind = about.at("input " + name);
  const auto parts = words(kind.substr(0, kind.find(':')));
  std::vector<int64_t> shape;
  for (size_t i = 1; i < parts.size(); i += 2) shape.push_back(std::stoll(parts[i]));
  const std::string path = folder + "/" + name + ".bin";
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error(path + ": cannot be opened");
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  // Rows that are no points hold NaN.
  at::Tensor x = at::zeros(shape, types.at(parts[0]));
  if (name == "points") x.fill_(NAN);
  if (name == "points" ? bytes.size() > x.nbytes() : bytes.size() != x.nbytes())
    throw std::runtime_error(path + ": has " + std::to_string(bytes.size()) + " bytes, the package takes " + kind);
  std::copy(bytes.begin(), bytes.end(), static_cast<char*>(x.data_ptr()));
  return about.at("device") == "cuda" ? x.to(at::kCUDA) : x;
}

int run(const std::string& path, const std::string& folder, float least_score) {
  torch::inductor::AOTIModelPackageLoader loader(path);
  const About about = loader.get_metadata();
  std::vector<at::Tensor> inputs;
  for (const auto& name : words(about.at("inputs"))) inputs.push_back(read_input(folder, name, about));

  const auto outputs = loader.run(inputs);
  std::map<std::string, at::Tensor> found;
  const auto names = words(about.at("outputs"));
  for (size_t i = 0; i < names.size(); ++i) found[names[i]] = outputs.at(i).cpu();

  const auto sizes = words(about.at("sizes"));
  for (size_t i = 0; i < sizes.size(); ++i) {
    const auto needed = found.at("needed")[i].item<int64_t>();
    if (needed > std::stoll(sizes[i])) {
      std::fprintf(stderr, "error: the points need %ld rows at level %zu, the package has %s; export it for this frame\n",
                   static_cast<long>(needed), i, sizes[i].c_str());
      return 2;
    }
  }
  const auto classes = words(about.at("classes"));
  const auto boxes = found.at("boxes")[0].contiguous(), scores = found.at("scores")[0].contiguous();
  const auto labels = found.at("labels")[0].contiguous(), is_kept = found.at("is_kept")[0].contiguous();
  for (int64_t i = 0; i < boxes.size(0); ++i) {
    if (!is_kept.data_ptr<bool>()[i] || scores.data_ptr<float>()[i] < least_score) continue;
    std::printf("%-20s %.4f", classes.at(labels.data_ptr<int64_t>()[i]).c_str(), scores.data_ptr<float>()[i]);
    for (int k = 0; k < 9; ++k) std::printf(" %9.3f", boxes.data_ptr<float>()[9 * i + k]);
    std::printf("\n");
  }
  return 0;
}

int main(int count, char** arguments) {
  if (count < 3 || count > 4) {
    std::fprintf(stderr, "usage: detect PACKAGE FOLDER [LEAST_SCORE]\n");
    return 2;
  }
  try {
    return run(arguments[1], arguments[2], count == 4 ? std::stof(arguments[3]) : 0.0f);
  } catch (const c10::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what_without_backtrace());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 2;
  }
}
