-- Lets requests to `guarded` through, and turns all others away: whoever could ask the models behind it would get labels
-- without a verdict, and could try triggers on the sentinel or read the overlays off.
--
-- The name of the model is in the message, not in the path. In all of Triton's messages that name a model it is field 1,
-- `name` or `model_name`. What is not understood here might be understood otherwise by Triton, so it is turned away: a
-- field that is given twice (of which the last counts), a tag that is longer than needed, compression. So is what would take
-- long to read.
--
-- Requests marked as canaries are not counted as live, and not kept if they are rejected: only the monitor may mark its own.

local SERVICE = "/inference.GRPCInferenceService/"
local WITHOUT_MODEL = {ServerLive = true, ServerReady = true, ServerMetadata = true}
local OF_A_MODEL = {ModelInfer = true, ModelReady = true, ModelMetadata = true, ModelConfig = true, ModelStatistics = true}
local MODEL = "guarded"
local CANARY, MONITOR = "stripwire_canary", "CN=stripwire-monitor"

local FRAME = 5 -- bytes before a message: whether it is compressed, and its length
local MOST_FIELDS, MOST_PARAMETER = 200, 4096 -- of a message, and bytes of a parameter
local NAME, PARAMETER = 1, 4 -- fields
local INVALID_ARGUMENT, PERMISSION_DENIED, INTERNAL = "3", "7", "13"
local VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5

-- Returns a number of at most five bytes, and where what follows it begins; nil where there is none.
local function read_varint(body, at, size)
  local value, factor = 0, 1
  for _ = 1, 5 do
    if at >= size then
      return nil
    end
    local byte = body:getBytes(at, 1):byte()
    at = at + 1
    value = value + (byte % 128) * factor
    if byte < 128 then
      return value, at
    end
    factor = factor * 128
  end
  return nil
end

-- Returns where the value of a field ends, and where its bytes begin; nil where it does not end within the message.
local function skip(body, wire_type, at, size)
  if wire_type == VARINT then
    for index = at, math.min(at + 9, size - 1) do
      if body:getBytes(index, 1):byte() < 128 then
        return index + 1
      end
    end
    return nil
  end
  local length
  if wire_type == BYTES then
    length, at = read_varint(body, at, size)
  else
    length = ({[FIXED_64] = 8, [FIXED_32] = 4})[wire_type]
  end
  if length == nil or at + length > size then
    return nil
  end
  return at + length, at
end

-- Returns the name in field 1, "" where there is none, and whether it is marked as a canary; nil where the message is not
-- understood.
local function model_in(body)
  local size = body:length()
  if size < FRAME then
    return nil
  end
  local compressed, a, b, c, d = body:getBytes(0, FRAME):byte(1, FRAME)
  if compressed ~= 0 or ((a * 256 + b) * 256 + c) * 256 + d ~= size - FRAME then
    return nil
  end
  local name
  local marked = false
  local at = FRAME
  local fields = 0
  while at < size do
    fields = fields + 1
    if fields > MOST_FIELDS then
      return nil
    end
    local tag = body:getBytes(at, 1):byte()
    local field, wire_type = math.floor(tag / 8), tag % 8
    if tag >= 128 or field == 0 then
      return nil
    end
    local stop, start = skip(body, wire_type, at + 1, size)
    if stop == nil then
      return nil
    end
    if field == PARAMETER and wire_type == BYTES then
      if stop - start > MOST_PARAMETER then
        return nil
      end
      marked = marked or (stop > start and body:getBytes(start, stop - start):find(CANARY, 1, true) ~= nil)
    end
    if field == NAME then
      if wire_type ~= BYTES or name ~= nil then
        return nil
      end
      -- A longer one is not ours, and need not be copied.
      name = stop - start == #MODEL and body:getBytes(start, #MODEL) or "another"
    end
    at = stop
  end
  return name or "", marked
end

local function refuse(handle, status, message)
  handle:respond({[":status"] = "200", ["content-type"] = "application/grpc", ["grpc-status"] = status, ["grpc-message"] = message})
end

local function is_monitor(handle)
  local encrypted = handle:connection():ssl()
  return encrypted ~= nil and encrypted:subjectPeerCertificate() == MONITOR
end

local function judge(handle)
  local path = handle:headers():get(":path")
  local method = path:sub(1, #SERVICE) == SERVICE and path:sub(#SERVICE + 1) or ""
  if WITHOUT_MODEL[method] then
    return
  end
  if not OF_A_MODEL[method] then
    refuse(handle, PERMISSION_DENIED, "the gateway lets nobody call " .. path:sub(1, 100):gsub("[^%w/._-]", "?"))
    return
  end
  local body = handle:body()
  local model, marked
  if body ~= nil then
    model, marked = model_in(body)
  end
  if model == nil then
    refuse(handle, INVALID_ARGUMENT, "the gateway does not understand this message: expected one, not compressed, with the model once and few fields")
  elseif model ~= MODEL then
    refuse(handle, PERMISSION_DENIED, "the gateway lets nobody ask another model than " .. MODEL)
  elseif marked and method == "ModelInfer" and not is_monitor(handle) then
    refuse(handle, PERMISSION_DENIED, "the gateway lets nobody but the monitor mark requests as canaries")
  end
end

-- Envoy lets a request through whose script fails: this one may not.
function envoy_on_request(handle)
  local fine, trouble = pcall(judge, handle)
  if not fine then
    handle:logErr("only_guarded.lua: " .. tostring(trouble))
    refuse(handle, INTERNAL, "the gateway failed")
  end
end
