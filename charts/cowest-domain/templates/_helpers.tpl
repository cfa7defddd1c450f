{{- define "cowest-domain.name" -}}
{{- .Values.name | default .Release.Name -}}
{{- end -}}

{{- define "cowest-domain.labels" -}}
app.kubernetes.io/name: cowest-domain
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: cowest
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end -}}

{{/* Labels of the chart's own pods: (dict "root" $ "component" NAME). Not cowest.dev/job, which is the operator's. */}}
{{- define "cowest-domain.own" -}}
cowest.dev/domain: {{ include "cowest-domain.name" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Labels of the job's pods: (dict "root" $ "component" NAME). */}}
{{- define "cowest-domain.pods" -}}
cowest.dev/job: {{ include "cowest-domain.name" .root }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* Selects the pods that the gateway runs in: on Ray, those of the cluster's head too. */}}
{{- define "cowest-domain.gateways" -}}
{{- if eq (dig "gateway" "engine" "ASGI" (include "cowest-domain.spec" . | fromJson)) "RayServe" -}}
matchExpressions:
- {key: cowest.dev/job, operator: In, values: [{{ include "cowest-domain.name" . }}]}
- {key: app.kubernetes.io/component, operator: In, values: [gateway, gateway-head]}
{{- else -}}
matchLabels: {{- include "cowest-domain.pods" (dict "root" . "component" "gateway") | nindent 2 }}
{{- end -}}
{{- end -}}

{{/* The address of an image: (dict "image" VALUES "root" $). */}}
{{- define "cowest-domain.image" -}}
{{- $registry := .root.Values.imageRegistry | default .image.registry -}}
{{- $name := printf "%s/%s" $registry .image.repository -}}
{{- if .image.digest -}}
{{- printf "%s@%s" $name .image.digest -}}
{{- else -}}
{{- printf "%s:%s" $name (.image.tag | default .root.Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "cowest-domain.pullSecrets" -}}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
{{- range . }}
- name: {{ . }}
{{- end }}
{{- end }}
{{- end -}}

{{- define "cowest-domain.podSecurity" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "cowest-domain.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end -}}

{{/* The job's spec as JSON: as given, with the place of the chart's own object store where none is said. */}}
{{- define "cowest-domain.spec" -}}
{{- $spec := deepCopy .Values.job -}}
{{- range list "weak" "strong" "data" "feedback" "objectStore" -}}
{{- if not (hasKey $spec .) -}}
{{- fail (printf "job.%s: wanted a section of the CollaborationJob's spec, saw none. docs/api.md describes it; charts/cowest-domain/ci/minimal-values.yaml is the smallest job" .) -}}
{{- end -}}
{{- end -}}
{{- if .Values.minio.enabled -}}
{{- if not $spec.objectStore.credentialsSecretRef -}}
{{- fail "job.objectStore.credentialsSecretRef: wanted the name of a Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, because minio.enabled takes its root user from it; saw none" -}}
{{- end -}}
{{- $own := dict "endpoint" (printf "http://%s-minio.%s.svc:9000" (include "cowest-domain.name" .) .Release.Namespace) "region" "us-east-1" "pathStyle" true -}}
{{- $_ := set $spec "objectStore" (merge $spec.objectStore $own) -}}
{{- end -}}
{{- toJson $spec -}}
{{- end -}}

{{/* The port of an address. */}}
{{- define "cowest-domain.port" -}}
{{- $url := urlParse . -}}
{{- $port := regexFind ":[0-9]+$" $url.host | trimPrefix ":" -}}
{{- $port | default (ternary "443" "80" (eq $url.scheme "https")) -}}
{{- end -}}

{{/* One egress rule: (dict "place" VALUES "addresses" LIST): to the place's peers, on its ports or the addresses'. */}}
{{- define "cowest-domain.egress" -}}
{{- $ports := list -}}
{{- range .place.ports -}}{{- $ports = append $ports (int .) -}}{{- end -}}
{{- if not $ports -}}
{{- range .addresses -}}{{- $ports = append $ports (include "cowest-domain.port" . | int) -}}{{- end -}}
{{- end -}}
{{- if not $ports -}}
{{- fail "networkPolicy: wanted at least one port of apiServer and of modelHub, saw none, which would let out to all of them" -}}
{{- end -}}
- ports:
{{- range $ports | uniq }}
  - {protocol: TCP, port: {{ . }}}
{{- end }}
{{- with .place.to }}
  to: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* To the object store. */}}
{{- define "cowest-domain.toStore" -}}
{{- if and .Values.minio.enabled (not .Values.networkPolicy.objectStore.to) -}}
- ports:
  - {protocol: TCP, port: 9000}
  to:
  - podSelector:
      matchLabels: {{- include "cowest-domain.own" (dict "root" . "component" "object-store") | nindent 8 }}
{{- else -}}
{{- $spec := include "cowest-domain.spec" . | fromJson -}}
{{ include "cowest-domain.egress" (dict "place" .Values.networkPolicy.objectStore "addresses" (list ($spec.objectStore.endpoint | default "https://aws"))) }}
{{- end -}}
{{- end -}}

{{/* Environment and volumes of a client of the object store, as the job's own pods have them. */}}
{{- define "cowest-domain.storeEnv" -}}
{{- $store := (include "cowest-domain.spec" . | fromJson).objectStore -}}
{{- with $store.endpoint }}
- {name: COWEST_S3_ENDPOINT, value: {{ . | quote }}}
{{- end }}
{{- with $store.region }}
- {name: AWS_REGION, value: {{ . | quote }}}
{{- end }}
{{- if hasKey $store "pathStyle" }}
- {name: COWEST_S3_PATH_STYLE, value: {{ $store.pathStyle | quote }}}
{{- end }}
{{- with $store.caBundleRef }}
- {name: COWEST_S3_CA, value: /etc/cowest/s3-ca/{{ .key | default "ca.crt" }}}
{{- end }}
{{- if $store.credentialsSecretRef }}
- {name: COWEST_S3_KEYS_FOLDER, value: /etc/cowest/s3-keys}
{{- end }}
{{- end -}}

{{/* The volume `s3-keys` with the keys of the object store: files, whose last line may end, as `--from-file` leaves it. */}}
{{- define "cowest-domain.storeKeys" -}}
{{- $store := (include "cowest-domain.spec" . | fromJson).objectStore -}}
name: s3-keys
projected:
  defaultMode: 0440
  sources:
  {{- range list "AWS_ACCESS_KEY_ID" "AWS_SECRET_ACCESS_KEY" "AWS_SESSION_TOKEN" }}
  - secret:
      name: {{ $store.credentialsSecretRef.name }}
      items: [{key: {{ . }}, path: {{ . }}}]
      {{- if eq . "AWS_SESSION_TOKEN" }}
      optional: true
      {{- end }}
  {{- end }}
{{- end -}}
